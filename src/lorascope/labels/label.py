"""Say in words what each feature responds to, and measure how far to believe it.

1. Read whole rollouts of the store, drawn at random, and encode them: it is then known of every
   token which features fire there.
2. One half of the rollouts chooses: `rules` finds a short rule for each feature.
3. The other half scores it: `score` compares the tokens that the rule covers with the firings. The
   rules of other features, scored in the same way, show what a wrong label gets.
4. With a report of `direct`, the tokens that a feature promotes describe its output. They are
   scored by how well the next token tells where the feature fires.
5. A label is unclear if the interval of its balanced accuracy begins below 0.7.
6. With `--llm-model`, a language model says what it sees, and a judge tests it (`explain`). Its
   label replaces the rule unless only the rule is clear. Labels by hand replace others.

In: feature index, activation store, SAE. Out: `labels.json`. No forward pass, and no network unless
you name a server. `labels.answers.jsonl` beside it keeps the server's answers.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.activations.store import ActivationStore
from lorascope.artifact import Identity, digest_file
from lorascope.config import Config, option
from lorascope.errors import ArtifactError, ConfigError, DatasetError
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import (
    BY_HAND,
    BY_RULE,
    FILE,
    KIND,
    KINDS,
    SCHEMA,
    Kind,
    Label,
    Output,
    write_labels,
)
from lorascope.features.published_json import digest_of_index, read_index
from lorascope.labels.chat import Chat
from lorascope.labels.clues import CLUES, Corpus, Ints, read_clues
from lorascope.labels.explain import CLEAR, explain, with_model
from lorascope.labels.rules import Miner, Rule, covers
from lorascope.labels.score import Score, against, against_same_token, score
from lorascope.labels.wording import (
    kind_of,
    name_of,
    parts_of,
    quoted,
    sentence_of,
    shortened,
    visible,
)
from lorascope.stage import Build, built
from lorascope.texts.roles import ROLES, has_role

if TYPE_CHECKING:
    from lorascope.causal.report_records import DirectReport, ScoredToken
    from lorascope.sae.model import SAE

log = logging.getLogger(__name__)

BY_HAND_FILE = "hand-labels.json"  # what the page exports
_BY_HAND_FORMAT = "lorascope labels 1"
_LONGEST = {"label": 200, "note": 20_000}  # characters of a label by hand
_ROWS = 1 << 14  # rows encoded at once
_N_SHUFFLED = 8  # other features whose rules are tried on each feature
_N_NEAR = 5  # neighbours of each kind
_N_PROMOTED = 5
_LEAST_Z = 3.0  # of a promoted token
_LEAST_SHARE = 0.1  # of a feature's effect that goes to the output directly
_MOSTLY = 0.6  # of a feature's firings are in its category
_CATEGORIES = {  # by the clue that most firings have; the first that fits
    "template": "template",
    "number": "digit",
    "operator": "operator",
    "line break": "line break",
    "punctuation": "punctuation",
    "symbol": "symbol",
    "name": "in a name",
    "word": "word",
}


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Config):
    """Options that `run` shares."""

    label_tokens: int = option(
        300_000, help="tokens of whole rollouts to read: one half chooses labels, the other scores"
    )

    def check(self) -> None:
        """Check the range of the number."""
        super().check()
        self.require("label_tokens", 1)


@dataclass(frozen=True, kw_only=True)
class LabelConfig(LabelOptions):
    """Options of `label`."""

    input: Path = option(
        help="feature index to label: features.h5, or JSON that collect wrote", identity=False
    )
    data_dir: Path | None = option(
        None, help="activation store of the index; default: activations beside it", identity=False
    )
    sae: Path | None = option(None, help="SAE of the index; default: sae beside it", identity=False)
    effects: tuple[Path, ...] = option(
        (), help="report of direct; default: effects/direct.json beside the index", identity=False
    )
    by_hand: Path | None = option(
        None,
        help="labels that the page exported; they replace others; default: hand-labels.json beside "
        "the index",
        identity=False,
    )
    llm_base_url: str | None = option(
        None,
        help="server with the OpenAI protocol, such as http://localhost:8000/v1; default: "
        "OPENAI_BASE_URL. The key is OPENAI_API_KEY",
        identity=False,
    )
    llm_model: str | None = option(
        None, help="model on the server that describes features; default: rules alone"
    )
    judge_model: str | None = option(
        None,
        help="model on the server that tests the descriptions; default: --llm-model, which then "
        "grades itself",
    )
    llm_parallel: int = option(8, help="questions to ask at the same time", identity=False)
    output: Path | None = option(
        None, help="JSON file to write; default: labels.json beside the index", identity=False
    )
    device: str = option("auto", help="auto, cpu, cuda or cuda:N", identity=False)
    overwrite: bool = option(False, help="replace an output of other settings", identity=False)

    def check(self) -> None:
        """Check the output's suffix."""
        super().check()
        self.require("llm_parallel", 1)
        if self.output is not None and self.output.suffix != ".json":
            raise ConfigError(f"--output is {self.output}, expected a .json file")
        if self.llm_model is None and (self.llm_base_url or self.judge_model):
            raise ConfigError("--llm-base-url and --judge-model need --llm-model; add it")


class HandLabel(NamedTuple):
    """What a person wrote of a feature."""

    label: str
    note: str


def run(config: LabelConfig) -> Path:
    """Label the features, or find the finished labels, and return their file."""
    from lorascope.sae.model import load_sae

    source = config.input.expanduser()
    index = read_index(source)
    store = ActivationStore.open(config.data_dir or source.parent / "activations")
    sae = load_sae(config.sae or source.parent / "sae", store)
    store = sae.narrow(store)
    _require_parents(index, source, store, sae)
    inputs = _inputs(config)
    direct = None if (path := inputs.get("direct")) is None else _read_direct(path, sae)
    by_hand = (
        {}
        if (path := inputs.get("by_hand")) is None
        else read_by_hand(path, sae.digest, len(index))
    )
    out, identity = config.output or source.with_name(FILE), identity_of(config)

    def make(build: Build) -> None:
        on_device = sae.to(runtime.pick_device(config.device))
        halves = read_halves(store, on_device, index, config.label_tokens)
        labels = label_features(halves, index, direct)
        if config.llm_model is not None:
            labels = ask_model(labels, index, direct, config, out.with_suffix(".answers.jsonl"))
        write_by_hand(labels, by_hand)
        content = {"n_features": len(index), **halves.sizes(), **summarize(labels)}
        manifest = identity.manifest(None, content)
        write_labels(build.path / FILE, labels, manifest)
        build.publish_file(FILE)
        log.info("\n%s", table(content))

    return built(out, identity, make, overwrite=config.overwrite)


def identity_of(config: LabelConfig) -> Identity:
    """Return what decides the labels. Raises ArtifactError if a file is missing."""
    digests = {name: digest_file(path) for name, path in _inputs(config).items()}
    parents = {"features": digest_of_index(config.input.expanduser()), **digests}
    return Identity(kind=KIND, schema=SCHEMA, settings=config.settings(), parents=parents)


def _inputs(config: LabelConfig) -> dict[str, Path]:
    """Return the report of `direct` and the labels by hand: those given, or those found."""
    folder = config.input.expanduser().parent
    if len(config.effects) > 1:
        raise ConfigError(f"--effects has {len(config.effects)} reports, expected one of direct")
    given = {"direct": next(iter(config.effects), None), "by_hand": config.by_hand}
    beside = {"direct": folder / "effects" / "direct.json", "by_hand": folder / BY_HAND_FILE}
    for path in given.values():
        if path is not None and not path.is_file():
            raise ArtifactError(f"{path} does not exist; give a file, or leave out the option")
    found = {name: path or beside[name] for name, path in given.items()}
    return {name: path for name, path in found.items() if path.is_file()}


def ask_model(
    labels: Mapping[int, Label],
    index: FeatureIndex,
    direct: "DirectReport | None",
    config: LabelConfig,
    cache: Path,
) -> dict[int, Label]:
    """Return the labels with those of the model that `config` names. `cache` keeps its answers."""
    url = config.llm_base_url or os.environ.get("OPENAI_BASE_URL")
    if not url or config.llm_model is None:
        raise ConfigError(
            "--llm-model needs a server; give --llm-base-url, such as http://localhost:8000/v1"
        )
    explainer = Chat(url, config.llm_model, cache, config.llm_parallel)
    judge = explainer
    if config.judge_model not in (None, config.llm_model):
        judge = Chat(url, config.judge_model, cache, config.llm_parallel)
    else:
        log.warning("%s grades its own labels; give another --judge-model", config.llm_model)
    written = {} if direct is None else _written(direct)
    said = explain(index, explainer, judge, sorted(labels), written)
    for chat in {id(chat): chat for chat in (explainer, judge)}.values():
        log.info("%s", chat.usage.describe(chat.model))
    return with_model(labels, said, explainer.model, judge.model)


def _written(direct: "DirectReport") -> dict[int, tuple[list[str], list[str]]]:
    """Return the tokens that features promote and suppress, where their effect is direct."""
    return {
        effect.feature: (
            [token.token for token in effect.promoted],
            [token.token for token in effect.suppressed],
        )
        for effect in direct.features
        if effect.share >= _LEAST_SHARE
    }


class Half(NamedTuple):
    """Tokens of one half of the rollouts, and each feature's firings among them.

    Feature i fires at the tokens `rows[offset[i]:offset[i + 1]]`, in ascending order. `next_id`
    `(token,)` is the id of the token that follows in the rollout, -1 for the last one.
    """

    corpus: Corpus
    offset: Ints
    rows: Ints
    next_id: npt.NDArray[np.int32]

    def firings(self, latent: int) -> Ints:
        """Return the tokens on which a feature fires."""
        return self.rows[self.offset[latent] : self.offset[latent + 1]]


class Halves(NamedTuple):
    """Rollouts that choose labels, and rollouts that score them."""

    choosing: Half
    scoring: Half

    def sizes(self) -> dict[str, int]:
        """Return how many rollouts and tokens each half has, for the manifest."""
        return {
            f"n_{what}_{half}": n
            for half, part in zip(("choosing", "scoring"), self, strict=True)
            for what, n in (
                ("rollouts", len(np.unique(part.corpus.rollout))),
                ("tokens", len(part.corpus)),
            )
        }


def read_halves(store: ActivationStore, sae: "SAE", index: FeatureIndex, n_tokens: int) -> Halves:
    """Read rollouts of at most `n_tokens` tokens, at least two, and encode them.

    The rollouts and the roles are those that the index was collected from.
    """
    n_rollouts = index.content.get("n_rollouts", store.n_rollouts)
    order = np.random.default_rng(0).permutation(n_rollouts)
    lengths = np.diff(store.rollout_start)
    n = int(np.searchsorted(np.cumsum(lengths[order]), n_tokens, side="right"))
    order = order[: max(n, 2)]
    if len(order) < 2:
        raise DatasetError(f"{store.path} has one rollout: labels need two, one to check the other")
    rollouts = np.sort(order)
    rows = np.concatenate(
        [np.arange(*store.rollout_start[rollout : rollout + 2]) for rollout in rollouts]
    )
    token_ids, roles = store.take_token_ids(rows), store.roles[rows]
    rollout = np.repeat(np.arange(len(rollouts)), lengths[rollouts])
    spelling = {i: store.vocabulary[i] for i in np.unique(token_ids).tolist()}
    corpus = read_clues(token_ids, roles, rollout, spelling)
    next_id = np.append(token_ids[1:], -1)
    next_id[np.flatnonzero(np.diff(rollout))] = -1
    row, latent = _fired(store, sae, rows)
    read = has_role(roles, index.manifest.settings.get("roles", ROLES))
    chooses = np.zeros(len(rollouts), bool)
    chooses[np.searchsorted(rollouts, order[::2])] = True

    def half(tokens: npt.NDArray[np.bool_]) -> Half:
        here = tokens[row]
        new_row = np.cumsum(tokens) - 1
        counts = np.bincount(latent[here], minlength=sae.d_sae)
        offset = np.concatenate([[0], np.cumsum(counts)])
        where = np.flatnonzero(tokens)
        return Half(corpus.take(where), offset, new_row[row[here]], next_id[where])

    return Halves(half(read & chooses[rollout]), half(read & ~chooses[rollout]))


def _fired(store: ActivationStore, sae: "SAE", rows: Ints) -> tuple[Ints, Ints]:
    """Return the firings at some rows of the store, as index into them and latent, by latent."""
    import torch

    parts: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]] = []
    with runtime.progress(len(rows), "label", "tokens") as bar:
        for start in range(0, len(rows), _ROWS):
            chunk = rows[start : start + _ROWS]
            code = sae.encode(torch.from_numpy(store.take(chunk)).to(sae.b_enc.device))
            row = np.repeat(np.arange(len(chunk)) + start, code.l0.cpu().numpy())
            parts.append((row.astype(np.int32), code.latents.cpu().numpy().astype(np.int32)))
            bar.update(len(chunk))
    row, latent = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(latent, kind="stable")
    return row[order].astype(np.int64), latent[order].astype(np.int64)


def label_features(
    halves: Halves, index: FeatureIndex, direct: "DirectReport | None" = None
) -> dict[int, Label]:
    """Return the labels by rule of all features that fire."""
    choosing, scoring = halves
    alive = np.flatnonzero(index.alive).tolist()
    miner = Miner(choosing.corpus)
    with runtime.progress(len(alive), "rules", "features") as bar:
        rules: dict[int, Rule] = {}
        for latent in alive:
            rules[latent] = miner.rule_of(choosing.firings(latent))
            bar.update()
    shuffled = _shuffled(scoring, rules)
    near = np.concatenate([index.near_decoder[:, :_N_NEAR], index.near_cofiring[:, :_N_NEAR]], 1)
    labels: dict[int, Label] = {}
    for latent in alive:
        rule, firings = rules[latent], scoring.firings(latent)
        covered = covers(scoring.corpus, rule)
        promoted = () if direct is None else _promoted(direct, latent)
        output, is_output = None, False
        if direct is not None and promoted:
            found = _score_next(scoring, latent, promoted)
            output = Output(
                tokens=tuple(visible(token.token) for token in promoted),
                share=round(min(direct.features[latent].share, 1.0), 4),
                balanced_accuracy=_rounded(found.balanced_accuracy),
                interval=_edges(found.interval),
            )
            chosen = score(choosing.corpus, covers(choosing.corpus, rule), choosing.firings(latent))
            is_output = not _is_clear(chosen) and _is_clear(_score_next(choosing, latent, promoted))
            if is_output:
                covered = _comes_next(scoring, promoted)
        neighbours = [scoring.firings(i) for i in near[latent].tolist() if i >= 0]
        found = score(scoring.corpus, covered, firings)
        category = _category(choosing, latent) or _category(scoring, latent) or "mixed"
        name, sentence, kind = describe(
            rule, choosing.corpus.texts, found, output, is_output=is_output
        )
        if category == "template" and kind in ("token", "context"):
            kind = "position"
        labels[latent] = Label(
            name=name,
            sentence=sentence,
            kind=kind,
            category=category,
            author=BY_RULE,
            balanced_accuracy=_rounded(found.balanced_accuracy),
            interval=_edges(found.interval),
            precision=_rounded(found.precision),
            recall=_rounded(found.recall),
            same_token=_rounded(against_same_token(scoring.corpus, covered, firings)),
            near=_rounded(against(covered, firings, np.concatenate([*neighbours, firings[:0]]))),
            shuffled=_rounded(shuffled.get(latent)),
            n_fired=len(firings),
            rule=() if is_output else parts_of(rule, choosing.corpus.texts),
            output=output,
        )
    return labels


def describe(
    rule: Rule, texts: Sequence[str], found: Score, output: Output | None, *, is_output: bool
) -> tuple[str, str, Kind]:
    """Return name, sentence and kind of a label with this score.

    With `is_output`, what the feature promotes describes it better than the rule.
    """
    name, words, kind = name_of(rule, texts), sentence_of(rule, texts), kind_of(rule)
    sentence = f"Fires on {words}."
    if is_output and output:
        name, kind = f"before {quoted(output.tokens, 3)}", "output"
        sentence = f"Fires before the tokens that it promotes, mostly on {words}."
    if found.balanced_accuracy is None:
        name, kind = f"unclear: too rare, {name}" if rule else "unclear: too rare", "unclear"
        sentence = f"Unclear: it does not fire on the held-out texts. On others: {words}."
    elif not _is_clear(found):
        name, kind = f"unclear: mostly {name}" if rule else "unclear", "unclear"
        sentence = f"Unclear: fires mostly on {words}." if rule else f"Unclear: {words}."
    if output:
        sentence += f" Promotes {quoted(output.tokens, _N_PROMOTED, 'and')}."
    return shortened(name), sentence, kind


def _is_clear(found: Score) -> bool:
    return found.interval is not None and found.interval[0] >= CLEAR


def _shuffled(half: Half, rules: Mapping[int, Rule]) -> dict[int, float]:
    """Return for each feature the mean balanced accuracy of the rules of some other features."""
    latents = [latent for latent in rules if 0 < len(half.firings(latent)) < len(half.corpus)]
    order = np.random.default_rng(1).permutation(latents).tolist()
    n = len(order)
    shifts = range(1, min(_N_SHUFFLED, n - 1) + 1)
    totals = dict.fromkeys(latents, 0.0)
    for i, author in enumerate(order if shifts else []):
        covered = covers(half.corpus, rules[author])
        n_covered = int(covered.sum())
        for shift in shifts:
            latent = order[(i + shift) % n]
            firings = half.firings(latent)
            n_hit = int(covered[firings].sum())
            wrong = (n_covered - n_hit) / (len(half.corpus) - len(firings))
            totals[latent] += (n_hit / len(firings) + 1 - wrong) / 2
    return {latent: total / len(shifts) for latent, total in totals.items() if shifts}


def _category(half: Half, latent: int) -> str:
    """Return what most firings are by their tokens; empty without firings."""
    firings = half.firings(latent)
    if not len(firings):
        return ""
    share = half.corpus.holds[firings].mean(0)
    number = {clue.name: i for i, clue in enumerate(CLUES)}
    fits = (name for name, clue in _CATEGORIES.items() if share[number[clue]] >= _MOSTLY)
    return next(fits, "mixed")


def _promoted(direct: "DirectReport", latent: int) -> "tuple[ScoredToken, ...]":
    """Return the tokens that a feature promotes most, far above the others."""
    effect = direct.features[latent]
    promoted = effect.promoted[:_N_PROMOTED] if effect.share >= _LEAST_SHARE else ()
    return tuple(token for token in promoted if token.z >= _LEAST_Z)


def _comes_next(half: Half, promoted: "tuple[ScoredToken, ...]") -> npt.NDArray[np.bool_]:
    """Return the tokens that one of these follows."""
    return np.isin(half.next_id, [token.token_id for token in promoted])


def _score_next(half: Half, latent: int, promoted: "tuple[ScoredToken, ...]") -> Score:
    """Return how well the next token tells where a feature fires."""
    return score(half.corpus, _comes_next(half, promoted), half.firings(latent))


def read_by_hand(path: Path, sae_digest: str, n_features: int) -> dict[int, HandLabel]:
    """Return what people wrote of features, from the file that the page exports.

    Raises ArtifactError if it is another file, or of another SAE.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _BY_HAND_FORMAT or not isinstance(data["features"], dict):
            raise ValueError("no labels")
        items = [(key, entry) for key, entry in data["features"].items() if isinstance(entry, dict)]
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ArtifactError(
            f"{path} has no labels by hand; give a file that the page wrote with Export labels"
        ) from error
    if data.get("sae") != sae_digest:
        raise ArtifactError(
            f"{path} has labels of another SAE ({str(data.get('sae'))[:12]}, expected "
            f"{sae_digest[:12]}), whose features have other numbers; give the labels of this one"
        )
    labels: dict[int, HandLabel] = {}
    for key, entry in items:
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < n_features):
            raise ArtifactError(
                f"{path} has a label of feature {visible(key[:40])}, the SAE has {n_features}; "
                "give the labels of this SAE"
            )
        texts = [
            value[:most] if isinstance(value := entry.get(name), str) else ""
            for name, most in _LONGEST.items()
        ]
        if texts[0].strip():
            labels[int(key)] = HandLabel(*texts)
    return labels


def write_by_hand(labels: dict[int, Label], by_hand: Mapping[int, HandLabel]) -> None:
    """Put labels by hand in the place of others. Nobody measured them: they have no scores."""
    unknown: dict[str, Any] = dict.fromkeys(
        ("balanced_accuracy", "interval", "precision", "recall", "same_token", "near", "shuffled")
    )
    blank = Label(
        name="",
        sentence="",
        kind="context",
        category="mixed",
        author=BY_HAND,
        n_fired=0,
        rule=(),
        **unknown,
    )
    for latent, hand in by_hand.items():
        name = " ".join(visible(hand.label).split())
        before = labels.get(latent, blank)
        labels[latent] = replace(
            before,
            name=name,
            sentence=visible(hand.note) or name,
            kind="context" if before.kind == "unclear" else before.kind,
            author=BY_HAND,
            rule=(),
            **unknown,
        )


def summarize(labels: Mapping[int, Label]) -> dict[str, Any]:
    """Return the figures of all labels, for the manifest. Without a score, a feature has 0.5."""
    by_rule = [label for label in labels.values() if label.author != BY_HAND]
    scores = np.array([0.5 if (s := x.balanced_accuracy) is None else s for x in by_rule])
    shuffled = [label.shuffled for label in by_rule if label.shuffled is not None]
    return {
        "n_labels": len(labels),
        "n_by_hand": len(labels) - len(by_rule),
        "n_by_kind": {kind: sum(x.kind == kind for x in labels.values()) for kind in KINDS},
        "balanced_accuracy": _rounded(float(scores.mean())) if len(scores) else None,
        "share_above_0.85": _rounded(float((scores >= 0.85).mean())) if len(scores) else None,
        "shuffled": _rounded(float(np.mean(shuffled))) if shuffled else None,
        "chance": 0.5,
    }


def table(content: Mapping[str, Any]) -> str:
    """Return the summary as a table to read."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in content["n_by_kind"].items() if n)
    rows = {
        "labels": f"{content['n_labels']:,} ({kinds})",
        "by hand": f"{content['n_by_hand']:,}",
        "balanced accuracy": f"{content['balanced_accuracy'] or 0.5:.3f} on "
        f"{content['n_rollouts_scoring']:,} held-out rollouts",
        "0.85 or more": f"{content['share_above_0.85'] or 0:.0%} of the features",
        "shuffled labels": f"{content['shuffled'] or 0.5:.3f} (chance: 0.5)",
    }
    return "\n".join(f"  {name:<18} {value}" for name, value in rows.items())


def _require_parents(index: FeatureIndex, source: Path, store: ActivationStore, sae: "SAE") -> None:
    """Raise ArtifactError unless the index was collected from this store with this SAE."""
    for name, digest, path in (
        ("activations", store.digest, store.path),
        ("sae", sae.digest, "the SAE"),
    ):
        known = index.manifest.parents.get(name)
        if known != digest:
            found = "does not say" if known is None else "was made from another one:"
            raise ArtifactError(
                f"{source} {found} {name} {'' if known is None else known[:12]}, {path} is "
                f"{digest[:12]}; give the --data-dir and --sae that it was collected from"
            )


def _read_direct(path: Path, sae: "SAE") -> "DirectReport":
    """Return a report of `direct`. Raises ArtifactError if it is of another SAE."""
    from lorascope.causal.report_records import DirectReport
    from lorascope.causal.study import read_report

    report, manifest = read_report(path, (DirectReport,))
    if manifest.parents.get("sae") != sae.digest or len(report.features) != sae.d_sae:
        raise ArtifactError(f"{path} is of another SAE; make the report again with this one")
    return report


def _edges(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (round(interval[0], 4), round(interval[1], 4))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
