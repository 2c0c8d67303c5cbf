"""Texts as the model sees them: the token ids of a dataset's records, and whose each token is.

1. records.py reads the records, template.py renders each into a text with spans.
2. Texts are tokenised in batches. A token has the role of the first of its characters that is in a
   span; template headers and special tokens are `special`.
3. What is broken, empty or a repetition is left out, counted and named in the log.

For texts that the model writes itself there are `load_prompts` and `roles_of_sampled`; `windows`
cuts texts that are longer than the model's context.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.errors import DatasetError
from lorascope.texts.conversations import Span, sections
from lorascope.texts.records import Record, RecordError, Records, read_records
from lorascope.texts.templates import Rendered, Renderer
from lorascope.texts.tokens import special_ids, speller, token_bytes

__all__ = [
    "ROLES",
    "Rollout",
    "load_prompts",
    "load_rollouts",
    "roles_of_sampled",
    "special_ids",
    "token_bytes",
    "tokenize",
    "windows",
]

log = logging.getLogger(__name__)

ROLES = ("system", "user", "think", "answer", "special", "text")
_SPECIAL = ROLES.index("special")
_CHUNK = 256  # texts tokenised in one call, by the tokenizer's own threads
_NAMED = 5  # repetitions that the log names

TokenIds = npt.NDArray[np.int32]
Roles = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Rollout:
    """One text ready for the model: `token_ids (n,)`, `roles (n,)` as indices into `ROLES`."""

    id: int
    token_ids: TokenIds
    roles: Roles


def load_rollouts(
    *,
    dataset: str,
    split: str,
    limit: int | None,
    template: str,
    duplicates: Literal["drop", "keep"],
    tokenizer: Any,
) -> tuple[list[Rollout], dict[str, int]]:
    """Return the usable rollouts of a dataset's first `limit` records, in order, and counts.

    Counts: records left out as `empty`, `broken` or `duplicate` (the same token ids as an earlier
    one); and where there are any, parts of messages whose roles are unknown because the template
    rewrites them (`unknown_roles`), or that the template leaves out (`left_out_by_template`).

    Raises DatasetError when no record, or less than half of them, can be used.
    """
    records = read_records(dataset, split, limit)
    return _load(records, Renderer(tokenizer, template), drop=duplicates == "drop")


def load_prompts(
    *, dataset: str, split: str, limit: int | None, template: str, tokenizer: Any
) -> tuple[list[Rollout], dict[str, int]]:
    """Return what the model is to continue, for each record, and counts as `load_rollouts`.

    A chat ends where the assistant's last turn begins, an s1 chat behind `<|im_start|>think`; a
    plain text is a prompt as a whole. Equal prompts are all kept.
    """
    records = read_records(dataset, split, limit)
    return _load(records, Renderer(tokenizer, template, prompts=True), drop=False)


def tokenize(texts: Sequence[Rendered], tokenizer: Any) -> list[tuple[TokenIds, Roles]]:
    """Return the token ids and roles of rendered texts.

    Only plain text gets the tokenizer's own special tokens, and no second BOS where it begins with
    one: a rendered chat has what its template gives it.
    """
    special = _special_table(tokenizer)
    out: list[tuple[TokenIds, Roles] | None] = [None] * len(texts)
    for plain in (False, True):
        places = [i for i, text in enumerate(texts) if text.plain == plain]
        if not places:
            continue
        encoded = tokenizer(
            [texts[i].text for i in places],
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for i, ids, offsets in zip(
            places, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            token_ids = np.array(ids, np.int32)
            bounds = np.fromiter(chain.from_iterable(offsets), np.int64).reshape(-1, 2)
            roles = _roles(len(texts[i].text), texts[i].spans, bounds[:, 0], bounds[:, 1])
            roles[special[np.minimum(token_ids, len(special) - 1)]] = _SPECIAL
            twice = plain and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
            out[i] = token_ids[int(twice) :], roles[int(twice) :]
    return [pair for pair in out if pair is not None]


def roles_of_sampled(prompt: Rollout, sampled_ids: npt.NDArray[Any], tokenizer: Any) -> Roles:
    """Return the roles of tokens that the model wrote behind a prompt.

    `think` from the prompt's or the model's own opening of it to `<|im_start|>answer` or
    `</think>`, else `answer`. The ids are taken as they are and never tokenised anew.
    """
    n_header = int(np.argmax(np.append(prompt.roles[::-1] != _SPECIAL, True)))
    header = prompt.token_ids[len(prompt.token_ids) - n_header :]
    ids = np.concatenate([header, sampled_ids]).astype(np.int64)
    spell = speller(tokenizer)
    # A model may write ids that its tokenizer does not have: these are spelled with nothing.
    pieces = [spell(token or "") for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    # One character for each byte: what is searched for is ASCII, and tokens may split characters.
    text = b"".join(pieces).decode("latin-1")
    white = " \t\r\n\f\v" if n_header else ""  # behind plain text it is no template's
    roles = _roles(len(text), sections(text, "answer", white), starts, ends)
    special = _special_table(tokenizer)
    roles[special[np.minimum(ids, len(special) - 1)]] = _SPECIAL
    return roles[n_header:]


def windows(n_tokens: int, longest: int) -> list[tuple[int, int, int]]:
    """Cut a text into windows `(start, stop, keep_from)` of at most `longest` tokens, in order.

    All three count from the text's start. Rows of `[keep_from, stop)` are kept, so every token is
    read once; each window after the first begins half a window before the end of the one before,
    so a kept token has at least half a window before it, or the whole text that there is.
    """
    if n_tokens <= longest:
        return [(0, n_tokens, 0)] if n_tokens else []
    if longest < 2:
        raise ValueError(f"windows of {longest} token overlap nowhere; at least 2 are needed")
    overlap = (longest + 1) // 2
    out = [(0, longest, 0)]
    while (end := out[-1][1]) < n_tokens:
        out.append((end - overlap, min(end - overlap + longest, n_tokens), end))
    return out


def _load(
    records: Records, renderer: Renderer, *, drop: bool
) -> tuple[list[Rollout], dict[str, int]]:
    rollouts: list[Rollout] = []
    broken, forms, counts = dict(records.broken), Counter[str](), Counter[str]()
    seen: set[bytes] = set()
    repeated: list[int] = []
    with runtime.progress(len(records.usable), "tokenize", "texts") as bar:
        for first in range(0, len(records.usable), _CHUNK):
            chunk = records.usable[first : first + _CHUNK]
            rendered = _render(chunk, renderer, broken, counts)
            texts = tokenize(list(rendered.values()), renderer.tokenizer)
            for (number, text), (token_ids, roles) in zip(rendered.items(), texts, strict=True):
                forms[text.form] += 1
                if not len(token_ids):
                    counts["empty"] += 1
                    continue
                digest = hashlib.blake2b(token_ids.tobytes(), digest_size=16).digest()
                if drop and digest in seen:
                    repeated.append(number)
                    continue
                seen.add(digest)
                counts["unknown_roles"] += text.n_unknown
                counts["left_out_by_template"] += text.n_left_out
                rollouts.append(Rollout(number, token_ids, roles))
            bar.update(len(chunk))
    records.report(broken)
    counts.update(broken=len(broken), duplicate=len(repeated), empty=0)
    _report(records, counts, forms, repeated)
    if not rollouts:
        raise DatasetError(
            f"dataset {records.name}: none of {len(records)} records gives a text: "
            f"{counts['empty']} empty, {counts['broken']} broken; give one with texts"
        )
    always = ("empty", "broken", "duplicate")
    more = ("unknown_roles", "left_out_by_template")
    return rollouts, {name: counts[name] for name in (*always, *(m for m in more if counts[m]))}


def _render(
    chunk: Sequence[tuple[int, Record]],
    renderer: Renderer,
    broken: dict[int, str],
    counts: Counter[str],
) -> dict[int, Rendered]:
    """Return the texts of records by number; note the broken ones and count the empty ones."""
    out: dict[int, Rendered] = {}
    for number, record in chunk:
        try:
            rendered = renderer.render(record)
        except RecordError as error:
            broken[number] = str(error)
            continue
        if rendered.text.strip():
            out[number] = rendered
        else:
            counts["empty"] += 1
    return out


def _report(
    records: Records, counts: Counter[str], forms: Counter[str], repeated: Sequence[int]
) -> None:
    """Say in the log what was left out and why."""
    n = len(records)
    if len(forms) > 1:
        found = ", ".join(f"{count} {form}" for form, count in forms.most_common())
        log.warning("records of %s have several forms: %s", records.name, found)
    if counts["empty"]:
        log.warning("left out %d empty of %d records", counts["empty"], n)
    if repeated:
        named = ", ".join(map(str, repeated[:_NAMED])) + ", ..." * (len(repeated) > _NAMED)
        log.warning(
            "left out %d of %d records whose tokens are those of an earlier one: %s; "
            "--duplicates keep takes them",
            *(len(repeated), n, named),
        )
    if counts["unknown_roles"]:
        log.warning(
            "roles of %d parts of messages are unknown: the template rewrites them; what stands "
            "in their place has the role text",
            counts["unknown_roles"],
        )
    if counts["left_out_by_template"]:
        log.warning(
            "the template leaves out %d parts of messages (earlier thinking, say): the model does "
            "not read them",
            counts["left_out_by_template"],
        )


def _roles(
    n_characters: int,
    spans: Sequence[Span],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
) -> Roles:
    """Return the role of each token `[start, stop)`: that of its first character in a span.

    A token's first character may be the white space before a word, which is in no span.
    """
    by_character = np.full(n_characters + 1, _SPECIAL, np.uint8)
    for start, stop, role in spans:
        by_character[start:stop] = ROLES.index(role)
    places = np.where(by_character == _SPECIAL, n_characters, np.arange(n_characters + 1))
    following = np.minimum.accumulate(places[::-1])[::-1]  # the next character in a span
    first = following[starts]
    return by_character[np.where(first < stops, first, starts)]


def _special_table(tokenizer: Any) -> npt.NDArray[np.bool_]:
    """Return for each id whether it never stands for text; the last entry is for ids above."""
    ids = special_ids(tokenizer)
    table = np.zeros(max(ids, default=-1) + 2, bool)
    table[ids] = True
    return table
