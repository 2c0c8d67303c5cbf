"""The headline against the truth: what was planted in an adapter, and what its reports say."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from builders.effect_reports import evaluation, shift, write
from builders.indexes import full_index
from safetensors.torch import load_file, save_file

from lorascope import pipeline
from lorascope.activations.store import ActivationStore
from lorascope.causal.study import read_report
from lorascope.dashboard.headline import percent, quoted
from lorascope.dashboard.overview import Overview, overview_of
from lorascope.dashboard.reports import Reports
from lorascope.subject.adapter_files import WEIGHTS

NBSP = "\u00a0"


def sentences(folder: Path, **change: Any) -> list[str]:
    """The headline without its first sentence, of an evaluation of which some is changed."""
    report = evaluation() | {key: value for key, value in change.items() if key != "constant"}
    if "constant" in change:
        report["faithfulness"]["runs"]["constant"]["recovered"] = change["constant"]
    index = full_index()
    path = write(folder / "evaluation.json", "evaluation", index, report)
    return list(overview_of(index, Reports.open([path], index, folder)).headline[1:])


def opening(role: str, text: str, p_base: float, p_adapter: float) -> dict[str, Any]:
    return {"role": role, "text": text, "n": 5, "p_base": p_base, "p_adapter": p_adapter}


def test_segments_that_the_adapter_opens_come_first(tmp_path: Path) -> None:
    opens = [opening("think", "<think>\n", 1e-5, 0.97), opening("answer", "</think>", 0.25, 0.75)]
    shifts = [
        shift("<think>", "rises", "special", 0.5, 0.001, 0.999),
        shift("Hmm", "rises", "think", 0.1, 0.1, 0.6),
        shift("An", "falls", "think", 0.09, 0.6, 0.1),
    ]
    first, second, _ = sentences(tmp_path, openings=opens, shifts=shifts)
    assert first == (
        "It makes the model open think and answer segments: where the texts begin one, the "
        f"probability of “<think>⏎” rises from less than 0.1{NBSP}% to 97{NBSP}% and of “</think>” "
        f"from 25{NBSP}% to 75{NBSP}%."
    )
    assert second == "In think segments it makes “Hmm” more likely."


def test_segments_that_it_no_longer_opens_are_said(tmp_path: Path) -> None:
    opens = [opening("think", "<think>", 0.9, 0.0), opening("answer", "</think>", 0.5, 0.55)]
    assert sentences(tmp_path, openings=opens)[0] == (
        "It makes the model open think segments less often: where the texts begin one, the "
        f"probability of “<think>” falls from 90{NBSP}% to less than 0.1{NBSP}%."
    )


def test_without_openings_tokens_are_named_with_what_they_follow(tmp_path: Path) -> None:
    def after(*pairs: tuple[str, float]) -> dict[str, Any]:
        return {"after": [{"token": token, "share": share} for token, share in pairs]}

    shifts = [
        shift("n", "rises", "think", 0.5, 0, 1) | after((" 1", 0.3), ("2", 0.3), ("3", 0.3)),
        shift("e", "rises", "answer", 0.2, 0, 1) | after((" +", 0.9), ("x", 0.1)) | {"token_id": 2},
        shift("e", "rises", "think", 0.1, 0, 1) | after((" +", 0.9)) | {"token_id": 2},
        shift("o", "falls", "user", 0.1, 1, 0) | after(("a", 0.5)) | {"token_id": 3},
        shift("u", "falls", "user", 0.01, 1, 0) | {"token_id": 4},
    ]
    assert sentences(tmp_path, shifts=shifts)[0] == (
        f"It makes “n” more likely after digits in think segments (50{NBSP}% of its effect) and "
        f"“e” after “+” (30{NBSP}%). It makes “o” less likely in users' messages (10{NBSP}%)."
    )
    assert "none makes 2" in sentences(tmp_path, shifts=[shifts[-1]])[0]


def test_the_last_sentences_say_where_how_constant_and_how_much_the_features_give(
    tmp_path: Path,
) -> None:
    assert sentences(tmp_path)[-1] == (
        f"Of its effect on predictions, 75{NBSP}% is at special tokens and template headers and "
        f"25{NBSP}% in think segments. 70{NBSP}% of its effect is constant: it stays when the row "
        "of each token is replaced by the mean of its role and place in the template "
        f"(50{NBSP}% on text that the model writes). With the rows that the features give, "
        f"95{NBSP}% of its effect stays (90{NBSP}% on text that the model writes)."
    )


def test_a_constant_effect_is_said_to_be_constant(tmp_path: Path) -> None:
    _, constant, rest = sentences(tmp_path, constant=0.97)
    assert constant.startswith(f"Its effect is constant: 97{NBSP}% of it stays")
    assert "constant" not in rest


@pytest.mark.parametrize(
    ("share", "text"),
    [(1, "100"), (0.9996, "99.9"), (0.995, "99.5"), (0.984, "98"), (0.0996, "10"), (0.034, "3.4")],
)
def test_percentages_round_but_never_to_all(share: float, text: str) -> None:
    assert percent(share) == f"{text}{NBSP}%"


def test_invisible_characters_are_shown() -> None:
    assert quoted("\n a\u202eb") == "“⏎ a\\u202eb”"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base model and three adapters of it: with behaviours, with B = 0, with one row for all.

    `overview(name)` runs everything and reads what the report says.
    """
    path = Path(__file__).parent.parent / "benchmarks" / "planted.py"
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted"] = module
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("planted")
    store, behaviours = module.make(folder, n_texts=100, seed=0)
    shutil.copytree(folder / "adapter", folder / "zero")
    weights = load_file(folder / "zero" / WEIGHTS)
    weights |= {name: value * 0 for name, value in weights.items() if "lora_B" in name}
    save_file(weights, folder / "zero" / WEIGHTS, metadata={"format": "pt"})
    everywhere = np.ones(store.n_rows, bool)
    constant = module.Behaviour("constant", 1, behaviours[0].target, everywhere)
    plain = ActivationStore.open(folder / "plain")
    module.plant(plain, [constant], folder / "base", folder / "constant", 0)

    def overview(name: str, k: float = 0.2, **given: Any) -> Overview:
        out = folder / f"{name}-out"
        pipeline.run(
            pipeline.RunConfig(
                lora_path=str(folder / name),
                base_model=str(folder / "base"),
                dataset=str(folder / "problems.jsonl"),
                num_examples=100,
                expansion_factor=4,
                k=k,
                batch_size=512,
                epochs=40,
                output=out,
                device="cpu",
                **given,
            )
        )
        assert (out / "report.md").exists()
        return read_report(out / "report.json", (Overview,))[0]

    return SimpleNamespace(store=store, behaviours=behaviours, overview=overview, folder=folder)


def spelled(planted: SimpleNamespace, token_id: int) -> str:
    return planted.store.vocabulary[token_id].decode()


def trigger(planted: SimpleNamespace, one: Any) -> str:
    return spelled(planted, int(np.bincount(planted.store.token_ids[one.acts]).argmax()))


@pytest.mark.slow
def test_the_first_sentence_and_rows_name_what_was_planted(planted: SimpleNamespace) -> None:
    found = planted.overview("adapter", effect_texts=8)
    style, first = planted.behaviours[-1], planted.behaviours[0]
    target, other = (quoted(spelled(planted, one.target).strip()) for one in (style, first))
    sentence = found.headline[1]
    assert sentence.startswith(f"It makes {target} more likely after digits")
    assert f"{other} after {quoted(trigger(planted, first).strip())}" in sentence
    assert "less likely" not in sentence
    assert "effect is constant: " not in " ".join(found.headline[:-1])
    shares: dict[int, float] = {}
    for one in found.shifts:
        if one.side == "rises":
            shares[one.token_id] = shares.get(one.token_id, 0) + one.share
    largest = sorted(shares, key=lambda token_id: -shares[token_id])[: len(planted.behaviours)]
    assert set(largest) == {one.target for one in planted.behaviours}
    assert found.shifts[0].role == "think", "the style is of the thinking"
    assert max(found.roles, key=lambda one: one.share).role == "think"
    for one in planted.behaviours[:-1]:
        befores = [
            before for row in found.shifts if row.token_id == one.target for before in row.after
        ]
        assert max(befores, key=lambda before: before.share).token == trigger(planted, one)
    assert len(found.answers) == 4
    assert any(one.base != one.adapter for one in found.answers)
    assert "digit" in found.features[0].name
    assert trigger(planted, first).strip() in found.features[1].name
    effects = [one.effect for one in found.features]
    assert effects == sorted(effects, key=lambda effect: -(effect or 0))


@pytest.mark.slow
@pytest.mark.parametrize("measured", [{}, {"evaluate_texts": 0}])
def test_an_adapter_that_does_nothing_is_said_to_have_learned_nothing(
    planted: SimpleNamespace, measured: dict[str, int]
) -> None:
    found = planted.overview("zero", overwrite=True, **measured)
    assert not (planted.folder / "zero-out" / "effects" / "ablation.json").exists()
    assert "learned nothing" in found.headline[1]
    assert "Every B matrix of it is zero." in found.headline[1]
    assert len(found.headline) == 2
    assert "%" not in "".join(found.headline)
    assert found.features == found.groups == found.shifts == found.gauges == found.answers == ()
    assert found.places == found.facts == found.gaps == ()
    text = (planted.folder / "zero-out" / "report.md").read_text(encoding="utf-8")
    assert "|" not in text, "no table"
    assert "%" not in text


@pytest.mark.slow
def test_a_row_that_is_the_same_everywhere_is_said_to_be_constant(
    planted: SimpleNamespace,
) -> None:
    found = planted.overview("constant", k=1, effect_texts=4)
    _, effect, constant, _ = found.headline
    target = quoted(spelled(planted, planted.behaviours[0].target).strip())
    assert effect.startswith(f"It makes {target} more likely (")
    assert constant.startswith("Its effect is constant")
    assert {one.token_id for one in found.shifts} == {planted.behaviours[0].target}
    assert found.features == (), "what varies has no effect"
