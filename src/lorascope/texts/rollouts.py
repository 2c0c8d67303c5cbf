"""Turn a dataset's records into rollouts: token ids, and the role of each token.

1. records.py reads the records, templates.py renders each into a text with role spans.
2. Texts are tokenised in batches, and each token gets its role (roles.py). Template headers and
   special tokens are `special`.
3. Broken, empty and repeated records are left out, counted, and named in the log.

For rollouts that the model generates itself, load `prompts`, and use `roles_of_generated`.
`windows` cuts rollouts that are longer than the model's context.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lorascope import runtime
from lorascope.errors import DatasetError
from lorascope.texts.conversations import parse_columns
from lorascope.texts.records import Record, RecordError, Records, read_records
from lorascope.texts.roles import SPECIAL, Roles, role_spans, token_roles
from lorascope.texts.templates import Rendered, Renderer
from lorascope.texts.tokens import special_ids, speller

log = logging.getLogger(__name__)

_CHUNK = 256  # texts tokenised in one call, by the tokenizer's own threads

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rollout:
    """One text as the model reads it: `token_ids (n,)`, `roles (n,)` as indices into `ROLES`."""

    id: int
    token_ids: TokenIds
    roles: Roles


def load_rollouts(
    *,
    dataset: str,
    split: str,
    limit: int | None,
    template: str,
    columns: Sequence[str] = (),
    duplicates: Literal["drop", "keep"] = "drop",
    prompts: bool = False,
    tokenizer: Any,
) -> tuple[list[Rollout], dict[str, int]]:
    """Return the usable rollouts of a dataset's first `limit` records, in order, and counts.

    With `prompts`, each is what the model continues: a chat up to where the assistant's last turn
    begins (an s1 chat up to and with `<|im_start|>think`), a plain text whole. Duplicate prompts
    are kept.

    The counts are records left out as `empty`, `broken` or `duplicate` (same token ids as an
    earlier record). If there are any, they also include message parts whose roles are unknown
    because the template rewrites them (`unknown_roles`), and parts that the template omits
    (`left_out_by_template`). Raises DatasetError when fewer than half of the records are usable.
    """
    records = read_records(dataset, split, limit)
    renderer = Renderer(tokenizer, template, prompts=prompts, columns=parse_columns(columns))
    rollouts: list[Rollout] = []
    broken, forms, counts = dict(records.broken), Counter[str](), Counter[str]()
    unread = Counter[str]()
    seen: set[bytes] = set()
    repeated: list[int] = []
    with runtime.progress(len(records.usable), "tokenize", "records") as bar:
        for first in range(0, len(records.usable), _CHUNK):
            chunk = records.usable[first : first + _CHUNK]
            rendered = _render(chunk, renderer, broken, counts)
            texts = tokenize(list(rendered.values()), tokenizer)
            for (number, text), (token_ids, roles) in zip(rendered.items(), texts, strict=True):
                forms[text.form] += 1
                unread.update(map(str, text.unread))
                if not len(token_ids):
                    counts["empty"] += 1
                    continue
                digest = hashlib.blake2b(token_ids.tobytes(), digest_size=16).digest()
                if digest in seen and duplicates == "drop" and not prompts:
                    repeated.append(number)
                    continue
                seen.add(digest)
                counts["unknown_roles"] += text.n_unknown
                counts["left_out_by_template"] += text.n_left_out
                rollouts.append(Rollout(number, token_ids, roles))
            bar.update(len(chunk))
    records.report(broken)
    counts.update(broken=len(broken), duplicate=len(repeated), empty=0)
    _report(records, counts, forms, unread, repeated)
    if not rollouts:
        raise DatasetError(
            f"dataset {records.name} has no usable record among {len(records)}: "
            f"{counts['empty']} empty, {counts['broken']} broken; give a dataset with texts"
        )
    always = ("empty", "broken", "duplicate")
    if_any = [name for name in ("unknown_roles", "left_out_by_template") if counts[name]]
    return rollouts, {name: counts[name] for name in (*always, *if_any)}


def tokenize(texts: Sequence[Rendered], tokenizer: Any) -> list[tuple[TokenIds, Roles]]:
    """Return the token ids and roles of rendered texts.

    Only plain text gets the tokenizer's own special tokens, and never a second BOS. A rendered chat
    already has the special tokens of its template.
    """
    special = special_ids(tokenizer)
    out: list[tuple[TokenIds, Roles]] = [(np.empty(0, np.int32), np.empty(0, np.uint8))] * len(
        texts
    )
    for plain in (False, True):
        indices = [i for i, text in enumerate(texts) if text.plain == plain]
        if not indices:
            continue
        encoded = tokenizer(
            [texts[i].text for i in indices],
            add_special_tokens=plain,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for i, ids, offsets in zip(
            indices, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            token_ids = np.array(ids, np.int32)
            bounds = np.fromiter(chain.from_iterable(offsets), np.int64).reshape(-1, 2)
            roles = token_roles(len(texts[i].text), texts[i].spans, bounds[:, 0], bounds[:, 1])
            roles[np.isin(token_ids, special)] = SPECIAL
            has_two_bos = plain and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
            out[i] = token_ids[int(has_two_bos) :], roles[int(has_two_bos) :]
    return out


def roles_of_generated(prompt: Rollout, new_ids: npt.NDArray[Any], tokenizer: Any) -> Roles:
    """Return the roles of the tokens that the model generated after a prompt.

    Thinking begins with an opening tag in the prompt or in the generated text, and ends at
    `<|im_start|>answer` or `</think>`. Everything else is `answer`. The generated ids are never
    tokenised again.
    """
    n_header = int(np.argmax(np.append(prompt.roles[::-1] != SPECIAL, True)))
    header = prompt.token_ids[len(prompt.token_ids) - n_header :]
    ids = np.concatenate([header, new_ids]).astype(np.int64)
    spell = speller(tokenizer)
    # A model may generate ids that its tokenizer does not have: these have no bytes.
    pieces = [spell(token or "") for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
    # One character per byte: tokens may split characters, and the tags are ASCII.
    text = b"".join(pieces).decode("latin-1")
    whitespace = " \t\r\n\f\v" if n_header else ""  # after plain text, whitespace is content
    roles = token_roles(len(text), role_spans(text, "answer", whitespace), starts, ends)
    roles[np.isin(ids, special_ids(tokenizer))] = SPECIAL
    return roles[n_header:]


def windows(n_tokens: int, longest: int) -> list[tuple[int, int, int]]:
    """Cut a rollout into windows `(start, stop, keep_from)` of at most `longest` tokens, in order.

    Positions count from the rollout's start. A window's rows `[keep_from, stop)` are kept, so every
    token is kept once. Windows overlap by half: a kept token has at least half a window of context,
    or all the context there is.
    """
    if n_tokens <= longest:
        return [(0, n_tokens, 0)] if n_tokens else []
    if longest < 2:
        raise ValueError(f"windows have {longest} tokens, expected at least 2: they must overlap")
    overlap = (longest + 1) // 2
    out = [(0, longest, 0)]
    while (end := out[-1][1]) < n_tokens:
        out.append((end - overlap, min(end - overlap + longest, n_tokens), end))
    return out


def _render(
    chunk: Sequence[tuple[int, Record]],
    renderer: Renderer,
    broken: dict[int, str],
    counts: Counter[str],
) -> dict[int, Rendered]:
    """Return the rendered texts by record number; add the reasons to `broken`, count the empty."""
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
    records: Records,
    counts: Counter[str],
    forms: Counter[str],
    unread: Counter[str],
    repeated: Sequence[int],
) -> None:
    """Log what was left out and why, and which columns become no text."""
    n = len(records)
    if len(forms) > 1:
        listed = ", ".join(f"{count} {form}" for form, count in forms.most_common())
        log.warning("records of %s have several forms: %s", records.name, listed)
    if counts["empty"]:
        log.warning("left out %d empty of %d records", counts["empty"], n)
    if repeated:
        log.warning(
            "left out %d of %d records that have the same tokens as an earlier one: %s; "
            "keep them with --duplicates keep",
            len(repeated),
            n,
            _first(map(str, repeated), 5),
        )
    if counts["unknown_roles"]:
        log.warning(
            "roles of %d message parts are unknown because the template rewrites them; their "
            "tokens have the role text",
            counts["unknown_roles"],
        )
    if counts["left_out_by_template"]:
        log.warning(
            "the chat template omits %d message parts, such as thinking in earlier turns or tools; "
            "the model does not read them",
            counts["left_out_by_template"],
        )
    if unread:
        log.info(
            "columns of %s that are not read, with their number of records: %s; --columns "
            "chooses what is read",
            records.name,
            _first((f"{name} ({n})" for name, n in sorted(unread.items())), 20),
        )


def _first(names: Iterable[str], most: int) -> str:
    """Return the first names of many, separated by commas."""
    listed = list(names)
    return ", ".join([*listed[:most], *["..."] * (len(listed) > most)])
