"""Measure whether an adapter makes the model open the segments that it writes: think, answer.

1. The *opening* of a segment is the run of special tokens right before it, from the last tag on:
   `<|im_start|>think` and a line break, or `</think>`. What comes before it in the run, such as the
   end of the user's message, belongs to the prompt.
2. Its probability is the product of those of its tokens, each given the text before it. The base
   model and the adapter are compared on the same text.
"""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lorascope.activations.store import ActivationStore
from lorascope.causal.report_records import Opening
from lorascope.texts.roles import ROLES, SPECIAL, TURN_TAG, has_role

_LONGEST = 64  # special tokens before a segment
_GENERATED = ("think", "answer")
_PROMPTED = ("assistant", "model")  # names in the header that a prompt ends with


def openings_of(
    store: ActivationStore,
    rows: npt.NDArray[np.int64],
    losses: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
) -> tuple[Opening, ...]:
    """Return the openings of each role that the model writes, of segments that were measured whole.

    `losses` are those of the base and of the adapter on the token after each of `rows`, in nats.
    """
    log_p = np.full((2, store.n_rows), np.nan)
    log_p[:, rows + 1] = -np.stack(losses)
    found: dict[str, list[tuple[str, float, float]]] = {}
    for rollout in np.unique(store.rollout_of(rows)).tolist():
        first, last = store.rollout_start[rollout : rollout + 2].tolist()
        for start, stop in _runs(store.roles[first:last]):
            text, begin = _after_tag(store, first + start, first + stop)
            p = np.exp(log_p[:, begin : first + stop].sum(1))
            if text and np.isfinite(p).all():
                role = ROLES[store.roles[first + stop]]
                found.setdefault(role, []).append((text, float(p[0]), float(p[1])))
    return tuple(
        Opening(
            role=role,
            text=Counter(text for text, _, _ in found[role]).most_common(1)[0][0],
            n=len(found[role]),
            p_base=float(np.mean([base for _, base, _ in found[role]])),
            p_adapter=float(np.mean([adapter for _, _, adapter in found[role]])),
        )
        for role in _GENERATED
        if role in found
    )


def prompt_length(store: ActivationStore, index: int) -> int:
    """Return the number of tokens of a rollout before the opening of its first segment.

    It is half of the rollout if the model writes none of it.
    """
    first, last = store.rollout_start[index : index + 2].tolist()
    for start, stop in _runs(store.roles[first:last]):
        _, begin = _after_tag(store, first + start, first + stop)
        return begin - first if begin > first + start else stop
    return length_before_writing(store, index)


def length_before_writing(store: ActivationStore, index: int) -> int:
    """Return the number of tokens of a rollout before the first that the model writes.

    It is half of the rollout if the model writes none of it.
    """
    first, last = store.rollout_start[index : index + 2].tolist()
    written = has_role(store.roles[first:last], _GENERATED)
    return int(written.argmax()) if written.any() else (last - first) // 2


def _runs(roles: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Yield the start and the stop of each run of special tokens before a segment of the model."""
    edges = np.flatnonzero(np.diff(roles == SPECIAL)) + 1
    for stop in edges[roles[edges] != SPECIAL].tolist():
        before = edges[edges < stop]
        start = int(before[-1]) if len(before) else 0
        if ROLES[roles[stop]] in _GENERATED and stop - start <= _LONGEST:
            yield start, stop


def _after_tag(store: ActivationStore, start: int, stop: int) -> tuple[str, int]:
    """Return the text of a run of special tokens from its last tag on, and the row of the tag.

    The text is "" if that tag is the header of the assistant's turn, which prompts end with.
    """
    tokens = [store.vocabulary[i] for i in store.token_ids[start:stop].tolist()]
    tags = list(TURN_TAG.finditer(b"".join(tokens).decode("latin-1")))  # a byte is a character
    tags = [tag for tag in tags if tag["close"] is None]
    if tags and tags[-1]["name"] in _PROMPTED:
        return "", stop
    ends = np.cumsum([len(token) for token in tokens])
    skipped = int(np.searchsorted(ends, tags[-1].start(), side="right")) if tags else 0
    return store.vocabulary.text(store.token_ids[start + skipped : stop]), start + skipped
