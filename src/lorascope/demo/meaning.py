"""Measure whether the demo's features mean something: best F1 for known classes of tokens.

The generator of the problems knows which characters are operators, digits, results that were
computed before, words of checking, answer markers and names. So:

1. `label_tokens` marks the tokens that hold such a character; only eligible tokens count.
2. Candidates are detectors of a class: a latent that fires (at its saved threshold), or a raw
   column above or below a cut, at the cut that is best for that class.
3. On the rollouts of even number the best candidate of each class is chosen, with its cut; on
   those of odd number its F1 is measured. Many candidates therefore gain nothing by luck.

The random dictionary has the SAE's size, units and L0, but directions drawn from a Gaussian.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope.activations.store import ActivationStore
from lorascope.demo.problems import CLASSES, FIELDS, Problem
from lorascope.sae.model import SAE

log = logging.getLogger(__name__)

Labels = dict[str, npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class Detector:
    """The best candidate for one class: which one, and its F1 on rollouts it was not chosen on."""

    candidate: str
    f1: float


def label_tokens(store: ActivationStore, problems: Sequence[Problem]) -> Labels:
    """Return for each class the rows whose token holds a character of it, `(n_rows,)` each.

    `problems[i]` is the problem of rollout id i.
    """
    labels = {name: np.zeros(store.n_rows, bool) for name in CLASSES}
    for index, rollout in enumerate(store.rollout_id):
        start, stop = (int(row) for row in store.rollout_start[index : index + 2])
        tokens = [store.vocabulary[i] for i in store.token_ids[start:stop]]
        ends = np.cumsum([len(token) for token in tokens])
        begins = ends - [len(token) for token in tokens]
        whole, position = b"".join(tokens), 0
        for field in FIELDS:
            text: str = getattr(problems[rollout], field)
            at = whole.find(text.encode(), position)
            if at < 0:
                continue  # the rollout was cut before this field ended
            position = at + len(text.encode())
            for name, spans in problems[rollout].spans[field].items():
                for first, last in spans:
                    left = at + len(text[:first].encode())
                    right = at + len(text[:last].encode())
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
    """Return the best latent for each class, as the module's text says."""
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
    found = {}
    for i, name in enumerate(CLASSES):
        positives = [int(labels[name][members].sum()) for members in (choose, measure)]
        best = int(np.argmax(_f1(n_hits[0, i], n_fires[0], positives[0])))
        f1 = _f1(n_hits[1, i], n_fires[1], positives[1])[best]
        found[name] = Detector(f"latent {best}", float(f1))
    return found


def score_columns(store: ActivationStore, labels: Labels) -> dict[str, Detector]:
    """Return the best raw column for each class, with the best sign and cut for that class."""
    choose, measure = (np.flatnonzero(members) for members in _halves(store))
    best: dict[str, tuple[float, int, float, float]]  # F1, column, sign, cut
    best = dict.fromkeys(CLASSES, (-1.0, 0, 1.0, 0.0))
    columns = store.rows(0, store.n_rows).astype(np.float32)
    for column in range(store.d_in):
        for sign in (1.0, -1.0):
            values = sign * columns[choose, column]
            order = np.argsort(-values, kind="stable")
            last = np.append(np.diff(values[order]) != 0, True)  # a cut cannot part equal values
            for name in CLASSES:
                hits = np.cumsum(labels[name][choose][order])
                f1 = _f1(hits, np.arange(1, len(hits) + 1), int(hits[-1])) * last
                at = int(np.argmax(f1))
                if f1[at] > best[name][0]:
                    best[name] = (float(f1[at]), column, sign, float(values[order[at]]))
    found = {}
    for name, (_, column, sign, cut) in best.items():
        fires = sign * columns[measure, column] >= cut
        truth = labels[name][measure]
        f1 = _f1(np.array([(fires & truth).sum()]), np.array([fires.sum()]), int(truth.sum()))
        side = ">=" if sign > 0 else "<="
        found[name] = Detector(f"{store.layout.column_names[column]} {side}", float(f1[0]))
    return found


def meaning_table(scores: Mapping[str, Mapping[str, Detector]]) -> str:
    """Return a Markdown table: a line for each class, a column for each kind of candidate."""
    kinds = list(scores)
    lines = ["| class | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in CLASSES:
        cells = [f"{scores[kind][name].f1:.3f}" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = [f"**{mean_f1(scores[kind]):.3f}**" for kind in kinds]
    return "\n".join([*lines, "| **mean** | " + " | ".join(means) + " |"])


def mean_f1(scores: Mapping[str, Detector]) -> float:
    """Return the mean over the classes."""
    return float(np.mean([detector.f1 for detector in scores.values()]))


def _halves(store: ActivationStore) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return the eligible rows of even and of odd rollouts, as masks `(n_rows,)`."""
    odd = store.rollout_of(np.arange(store.n_rows)) % 2 == 1
    return store.eligible & ~odd, store.eligible & odd


def _f1(hits: npt.NDArray[Any], fires: npt.NDArray[Any], positives: int) -> npt.NDArray[np.float64]:
    return 2 * hits / np.maximum(fires + positives, 1)
