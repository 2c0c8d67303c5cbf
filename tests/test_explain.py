"""Labels by a language model: what it sees, what the judge sees, and what scores are worth."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.chat_server import chat_server
from builders.indexes import example, index_of
from builders.labels import label_of
from hypothesis import given
from hypothesis import strategies as st

from lorascope.features.index import FeatureIndex
from lorascope.labels.chat import Chat
from lorascope.labels.excerpts import Excerpts, HeldOutTexts, is_held_out
from lorascope.labels.explain import explain, explain_question, read_explanation

WORDS = {1: " one", 2: " two", 3: " three", 4: " four", 5: " «5»", 6: "<|im_end|>"}
N_LATENTS = 4  # latent i fires at word i + 1, and nowhere else
RULES = {i: label_of("unclear", kind="unclear") for i in range(N_LATENTS)}


@cache
def planted_index() -> FeatureIndex:
    """Eight rollouts of 30 words; each latent fires at one word."""
    rng = np.random.default_rng(0)
    texts = [np.r_[rng.integers(1, 6, 29), 6] for _ in range(8)]
    firings: list[list[Any]] = [[] for _ in range(N_LATENTS)]
    for rollout, ids in enumerate(texts):
        for at, word in enumerate(ids.tolist()):
            if word > N_LATENTS:
                continue
            window = ids[max(0, at - 3) : at + 4].tolist()
            where = min(at, 3)
            also = [i for i, other in enumerate(window) if other == word and i != where]
            firings[word - 1].append(
                example(
                    float(rng.uniform(1, 2)),
                    30 * rollout + at,
                    window,
                    where,
                    rollout=rollout,
                    position=at,
                    also=also,
                )
            )
    joined = np.concatenate(texts)
    return index_of(
        [of_latent[:10] for of_latent in firings],
        {i: word.encode() for i, word in WORDS.items()},
        [of_latent[10:20] for of_latent in firings],
        latents={
            "near_decoder": [[1, 2], [0, 2], [0, 1], [0, 1]],
            "near_cosine": np.zeros((N_LATENTS, 2)),
            "text_rollout": np.arange(8),
            "text_why": np.ones(8),
            "text_l0": np.ones(8),
            "text_fvu": np.ones(8),
            "text_rarity": np.ones(8),
            "text_offset": np.arange(0, 241, 30),
            "text_token_id": joined,
            "text_role": np.zeros(240),
            "text_code_offset": np.r_[0, np.cumsum(joined <= N_LATENTS)],
            "text_latent": joined[joined <= N_LATENTS] - 1,
            "text_value": np.ones((joined <= N_LATENTS).sum()),
        },
        context_window=3,
    )


def marked(excerpt: str) -> str:
    return excerpt.split("«")[1].split("»", maxsplit=1)[0]


def test_the_author_sees_one_half_of_the_rollouts_and_the_judge_the_other() -> None:
    index = planted_index()
    corpus = HeldOutTexts(index)
    for latent in range(N_LATENTS):
        excerpts = corpus.excerpts(latent)
        seen = {
            "".join(e.tokens): is_held_out(e.rollout)
            for e in (*index[latent].examples, *index[latent].samples)
        }
        for text in (*excerpts.strongest, *excerpts.typical):
            plain = re.sub(r"«(.*?)\|\d»", r"\1", text).replace("‹", "«").replace("›", "»")
            assert not seen[plain]
        assert excerpts.draws
        for draw in excerpts.draws:
            assert {fires for _, fires in draw} == {True, False}
            for text, fires in draw:
                assert (marked(text) == WORDS[latent + 1]) == fires
    assert corpus.excerpts(0) == HeldOutTexts(index).excerpts(0)


def test_marks_in_the_corpus_are_no_marks() -> None:
    excerpts = HeldOutTexts(planted_index()).excerpts(0)
    texts = [*excerpts.strongest, *excerpts.typical, *(t for d in excerpts.draws for t, _ in d)]
    assert any("‹5›" in text for text in texts)
    assert not any("«5»" in text for text in texts)
    for draw in excerpts.draws:
        assert all(text.count("«") == 1 for text, _ in draw)


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), min_size=1, max_size=4))
def test_no_text_can_leave_its_quotes(texts: list[str], tokens: list[str]) -> None:
    excerpts = Excerpts(strongest=tuple(texts), typical=(), draws=())
    data = json.loads(explain_question(excerpts, tokens, tokens).user)
    assert data["strongest"] == texts
    assert data["promotes"] == tokens


@pytest.mark.parametrize(
    "answer",
    [
        {},
        [],
        None,
        {"name": "a", "sentence": "b"},
        {"name": "a", "sentence": "b", "kind": "new"},
        {"name": " ", "sentence": "b", "kind": "token"},
        {"name": 3, "sentence": "b", "kind": "token"},
        json.loads((explain_question(Excerpts((), (), ()), [], []).example or ("", ""))[1]),
    ],
)
def test_an_explanation_of_another_form_is_refused(answer: Any) -> None:
    with pytest.raises(ValueError, match="expected|of the example"):
        read_explanation(answer)


def test_an_explanation_is_one_clean_line() -> None:
    hostile = {
        "name": "a\n\x1b[2Jb\u202e" + "x" * 500,
        "sentence": "<script>\x00alert(1)</script>\t" + "y" * 5000,
        "kind": "token",
    }
    found = read_explanation(hostile)
    assert found.name.startswith("a [2Jb") and len(found.name) <= 60
    assert found.name.isprintable() and found.sentence.isprintable()
    assert found.sentence.startswith("<script>alert(1)</script> y") and len(found.sentence) <= 300


def data_of(body: dict[str, Any]) -> Any:
    """The question's data: the last message of the user that is no word on a wrong answer."""
    texts = [m["content"] for m in body["messages"] if m["role"] == "user"]
    return json.loads([text for text in texts if text.startswith("{")][-1])


def honest(body: dict[str, Any], _: int) -> str:
    """A model that names the marked word, and a judge that believes the name."""
    data = data_of(body)
    if "strongest" in data:
        word = marked(data["strongest"][0]).split("|")[0].strip()
        return json.dumps({"name": word, "sentence": f"the word {word}", "kind": "token"})
    word = data["description"].split()[-1]
    if "excerpts" in data:
        return json.dumps({"fires": [marked(text).strip() == word for text in data["excerpts"]]})
    return json.dumps({"choice": [option[0] for option in data["options"]].index(f"after {word}")})


def test_true_labels_score_one_and_shuffled_ones_do_not(tmp_path: Path) -> None:
    written = {i: ([f"after {WORDS[i + 1].strip()}"], ["x"]) for i in range(N_LATENTS)}
    with chat_server(honest) as server:
        chat = Chat(server.url, "honest", tmp_path / "answers.jsonl", n_parallel=2)
        found = explain(RULES, planted_index(), chat, chat, range(N_LATENTS), written)
    assert sorted(found) == list(range(N_LATENTS))
    for latent, one in found.items():
        assert one.name == WORDS[latent + 1].strip()
        assert one.kind == "token"
        assert (one.author, one.judge) == ("honest", "honest")
        assert one.balanced_accuracy == 1
        assert (one.shuffled or 0) < 0.75
        assert one.picked_output


@pytest.mark.parametrize(("off_by", "score"), [(0, 1.0), (1, 0.0), (None, None)])
def test_the_judge_is_asked_for_the_tokens_that_a_removal_lowers(
    tmp_path: Path, off_by: int | None, score: float | None
) -> None:
    """Prose stands around its choice; off by one it is wrong, and prose alone is no answer."""
    falls = {i: [f"after {WORDS[i + 1].strip()}", "x"] for i in range(N_LATENTS + 1)}
    rivals = {i: [other for other in falls if other != i] for i in falls}

    def chatty(body: dict[str, Any], number: int) -> str:
        answer = json.loads(honest(body, number))
        if "choice" not in answer:
            return json.dumps(answer)
        assert "less likely without" in body["messages"][0]["content"]
        if off_by is None:
            return "None of them fits."
        answer["choice"] = (answer["choice"] + off_by) % len(falls)
        return f"Of the lists I pick this one: {json.dumps(answer)} I hope that it helps."

    with chat_server(chatty) as server:
        chat = Chat(server.url, "chatty", tmp_path / "answers.jsonl")
        found = explain(RULES, planted_index(), chat, chat, range(N_LATENTS), {}, falls, rivals)
    for label in found.values():
        assert label.picked_effect == score
        wrong = label.picked_effect_shuffled
        assert wrong is None if off_by is None else wrong in (0, 1)
        assert wrong == 0 or off_by != 0, "another's description finds another's tokens"
        assert label.picked_output is None


@pytest.mark.parametrize(
    ("judged", "score"),
    [(lambda fires: [True] * len(fires), 0.5), (lambda fires: fires + [True] * 90, 1)],
    ids=["always yes", "does not count: the first answers are judged"],
)
def test_a_judge_that_is_no_judge_scores_chance_and_one_that_goes_on_is_cut(
    tmp_path: Path, judged: Any, score: float
) -> None:
    def answer(body: dict[str, Any], number: int) -> str:
        said = json.loads(honest(body, number))
        return json.dumps({"fires": judged(said["fires"])} if "fires" in said else said)

    with chat_server(answer) as server:
        chat = Chat(server.url, "odd", tmp_path / "answers.jsonl")
        found = explain(RULES, planted_index(), chat, chat, range(N_LATENTS), {})
    assert {one.balanced_accuracy for one in found.values()} == {score}
    assert {one.picked_output for one in found.values()} == {None}


def test_features_without_an_answer_are_left_out(tmp_path: Path) -> None:
    def mute_for_two(body: dict[str, Any], number: int) -> str:
        text = honest(body, number)
        return "I will not." if '"two"' in text else text

    with chat_server(mute_for_two) as server:
        chat = Chat(server.url, "mute", tmp_path / "answers.jsonl")
        found = explain(RULES, planted_index(), chat, chat, range(N_LATENTS), {})
    assert found[1] == RULES[1]
    assert all(found[i].author == "mute" and found[i].recall == 1 for i in (0, 2, 3))
