"""Print how well the demo's features match known classes of tokens: F1 on held-out rollouts.

    python examples/feature_meaning.py demo-output

The generator of the demo's problems knows which characters are operators, digits, results carried
over from an earlier step, words of checking, answer markers and names.

1. `label_tokens` marks every token that contains a character of a class. Only eligible tokens
   count.
2. A candidate detector is a latent that fires (at its saved threshold), or a raw column above or
   below a cut. Each class has its own best cut.
3. The best candidate of each class, and its cut, is chosen on rollouts with even numbers. Its F1 is
   measured on those with odd numbers, so having many candidates is no advantage.

The random dictionary has the SAE's size, units and L0, but Gaussian directions.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from demo_problems import CLASSES, FIELDS, Problem, make_problem

from lorascope import SAE, ActivationStore, load_sae

Labels = dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Detector:
    """The best candidate for one class, and its F1 on rollouts that did not choose it."""

    candidate: str
    f1: float


def label_tokens(store: ActivationStore, problems: Sequence[Problem]) -> Labels:
    """Return a mask `(n_rows,)` for each class: rows whose token contains such a character.

    `problems[i]` is the problem of rollout id i.
    """
    labels = {name: np.zeros(store.n_rows, bool) for name in CLASSES}
    for index, rollout in enumerate(store.rollout_id):
        start, stop = (int(row) for row in store.rollout_start[index : index + 2])
        tokens = [store.vocabulary[i] for i in store.token_ids[start:stop]]
        ends = np.cumsum([len(token) for token in tokens])
        begins = ends - [len(token) for token in tokens]
        text, position = b"".join(tokens), 0
        for field in FIELDS:
            part: str = getattr(problems[rollout], field)
            at = text.find(part.encode(), position)
            if at < 0:
                continue  # the rollout was cut before this field ended
            position = at + len(part.encode())
            for name, spans in problems[rollout].spans[field].items():
                for first, last in spans:
                    left = at + len(part[:first].encode())
                    right = at + len(part[:last].encode())
                    labels[name][start:stop] |= (begins < right) & (ends > left)
    return labels


def random_dictionary(sae: SAE, store: ActivationStore, seed: int) -> SAE:
    """Return a dictionary of random directions with the SAE's size, units and L0 on the store."""
    generator = torch.Generator().manual_seed(seed)
    scale = sae.scale
    directions = torch.randn(sae.d_sae, sae.d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    encoder = (directions * scale).T.contiguous()
    rows = np.flatnonzero(store.eligible)
    sample = torch.from_numpy(store.take(rows[:: max(1, len(rows) // 8192)]).astype(np.float32))
    fires = np.diff(sae.encode(sample).offsets.numpy()).mean()
    blank = replace(
        sae, W_enc=encoder, b_enc=-(sample.mean(0) @ encoder), W_dec=directions, threshold=None
    )
    return blank.calibrated(store, rows, float(fires))


def score_latents(sae: SAE, store: ActivationStore, labels: Labels) -> dict[str, Detector]:
    """Return the best latent for each class, chosen on one half and measured on the other."""
    choose, measure = _halves(store)
    n_fires, n_hits = np.zeros((2, sae.d_sae)), np.zeros((2, len(CLASSES), sae.d_sae))
    for start, rows in store.blocks(4096):
        code = sae.encode(torch.from_numpy(np.array(rows)))
        row = start + np.repeat(np.arange(len(rows)), np.diff(code.offsets.numpy()))
        latent = code.latents.numpy()
        for half, members in enumerate((choose, measure)):
            here = members[row]
            n_fires[half] += np.bincount(latent[here], minlength=sae.d_sae)
            for i, name in enumerate(CLASSES):
                hit = here & labels[name][row]
                n_hits[half, i] += np.bincount(latent[hit], minlength=sae.d_sae)
    detectors = {}
    for i, name in enumerate(CLASSES):
        positives = [int(labels[name][members].sum()) for members in (choose, measure)]
        best = int(np.argmax(_f1(n_hits[0, i], n_fires[0], positives[0])))
        f1 = _f1(n_hits[1, i], n_fires[1], positives[1])[best]
        detectors[name] = Detector(f"latent {best}", float(f1))
    return detectors


def score_columns(store: ActivationStore, labels: Labels) -> dict[str, Detector]:
    """Return the best raw column for each class, with the best sign and cut."""
    choose, measure = (np.flatnonzero(members) for members in _halves(store))
    best: dict[str, tuple[float, int, float, float]]  # F1, column, sign, cut
    best = dict.fromkeys(CLASSES, (-1.0, 0, 1.0, 0.0))
    columns = store.rows(0, store.n_rows).astype(np.float32)
    for column in range(store.d_in):
        for sign in (1.0, -1.0):
            values = sign * columns[choose, column]
            order = np.argsort(-values, kind="stable")
            # A cut cannot separate equal values.
            last = np.append(np.diff(values[order]) != 0, True)
            for name in CLASSES:
                hits = np.cumsum(labels[name][choose][order])
                f1 = _f1(hits, np.arange(1, len(hits) + 1), int(hits[-1])) * last
                at = int(np.argmax(f1))
                if f1[at] > best[name][0]:
                    best[name] = (float(f1[at]), column, sign, float(values[order[at]]))
    detectors = {}
    for name, (_, column, sign, cut) in best.items():
        fires = sign * columns[measure, column] >= cut
        truth = labels[name][measure]
        f1 = _f1(np.array([(fires & truth).sum()]), np.array([fires.sum()]), int(truth.sum()))
        side = ">=" if sign > 0 else "<="
        detectors[name] = Detector(f"{store.layout.column_names[column]} {side}", float(f1[0]))
    return detectors


def meaning_table(scores: Mapping[str, Mapping[str, Detector]]) -> str:
    """Return a Markdown table with a line per class and a column per kind of candidate."""
    kinds = list(scores)
    lines = ["| class | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in CLASSES:
        cells = [f"{scores[kind][name].f1:.3f}" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = [f"**{mean_f1(scores[kind]):.3f}**" for kind in kinds]
    return "\n".join([*lines, "| **mean** | " + " | ".join(means) + " |"])


def mean_f1(scores: Mapping[str, Detector]) -> float:
    """Return the mean F1 over the classes."""
    return float(np.mean([detector.f1 for detector in scores.values()]))


def _halves(store: ActivationStore) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return the eligible rows of even and of odd rollouts as masks `(n_rows,)`."""
    is_odd = store.rollout_of(np.arange(store.n_rows)) % 2 == 1
    return store.eligible & ~is_odd, store.eligible & is_odd


def _f1(hits: npt.NDArray[Any], fires: npt.NDArray[Any], positives: int) -> npt.NDArray[np.float64]:
    return 2 * hits / np.maximum(fires + positives, 1)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    store = ActivationStore.open(folder / "activations")
    sae = load_sae(folder / "sae", store)
    labels = label_tokens(store, [make_problem("demo", i) for i in range(store.n_rollouts)])
    random = random_dictionary(sae, store, seed=0)
    scores = {
        "SAE, best feature": score_latents(sae, store, labels),
        "LoRA, best raw column": score_columns(store, labels),
        "random dictionary": score_latents(random, store, labels),
    }
    print(meaning_table(scores))


if __name__ == "__main__":
    main()
