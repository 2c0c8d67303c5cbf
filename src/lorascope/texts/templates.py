"""Render records with a tokenizer's chat template, and find where each part of them went.

A *part* is what a message says, without the whitespace around it.

1. Render the messages. The model reads this text.
2. Render them again with a numbered mark in place of each part. Messages of the same shape share
   this rendering.
3. Replace the marks by the parts. If this gives the text of step 1, the span of every part is
   known, whatever its words are. A part without a mark was omitted by the template.
4. Otherwise the template rewrites parts. Search for them: a part that occurs once in the remaining
   text is found. Text between found parts, where a part is missing, has the role `text`.

What the template itself adds is in no span, except its own system prompt.
"""

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import lru_cache
from os.path import commonprefix
from typing import Any

from lorascope.errors import DatasetError, first_line
from lorascope.texts.conversations import (
    S1_THINK,
    Message,
    cut_at_reply,
    detect_form,
    field_spans,
    has_text,
    plain_text,
    read_messages,
    read_tools,
)
from lorascope.texts.records import Fields, Record, RecordError
from lorascope.texts.roles import ROLE_OF_SPEAKER, TURN_TAG, Span, role_spans, stripped_span
from lorascope.texts.tokens import special_ids

# Templates that write today's date would give a different text every day. 26 July 2024 is the
# fallback of Llama 3's own template.
_DATE = {"%d": "26", "%-d": "26", "%e": "26", "%m": "07", "%-m": "7", "%y": "24", "%Y": "2024"}
_DATE |= {"%b": "Jul", "%B": "July", "%a": "Fri", "%A": "Friday", "%H": "12", "%M": "00"}
_DATE |= {"%S": "00", "%I": "12", "%p": "PM", "%F": "2024-07-26"}


@dataclass(frozen=True)
class Rendered:
    """A text as the model reads it, and its role spans. `text` is empty if the record is blank.

    A `plain` text still needs the special tokens that the tokenizer adds around any text.
    `n_unknown` counts message parts that the template rewrites, `n_left_out` those that it omits;
    `unread` names the record's columns that do not become text.
    """

    form: str
    text: str = ""
    spans: Sequence[Span] = ()
    plain: bool = False
    n_unknown: int = 0
    n_left_out: int = 0
    unread: Set[str] = frozenset()


@dataclass
class _Marked:
    """Messages with a mark in place of each part."""

    messages: list[Message] = field(default_factory=list)
    parts: list[tuple[str, str]] = field(default_factory=list)  # text, role
    n_before_call: list[int] = field(default_factory=list)  # parts before each tool call


class Renderer:
    """Renders records; with `prompts`, only up to where the assistant's last turn begins.

    `columns` says in which column of a record each field is (`parse_columns`).
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        *,
        prompts: bool = False,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.tokenizer, self.template, self.prompts = tokenizer, template, prompts
        self.columns = columns or {}
        self._takes_parts = False  # whether the template wants content as a list of parts
        self._added = set(tokenizer.get_added_vocab())
        names = tokenizer.convert_ids_to_tokens(special_ids(tokenizer))
        longest_first = sorted(set(names), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._split_at_marks = lru_cache(maxsize=256)(self._uncached_split)
        self._template_system = lru_cache(maxsize=256)(self._find_template_system)

    def render(self, record: Record) -> Rendered:
        """Return the text of a record. Raises RecordError when it cannot be rendered."""
        record = Fields(record, self.columns)
        form = self.template
        if form == "auto":
            form = detect_form(record, prompts=self.prompts)
            if self.tokenizer.chat_template is None and has_text(record):
                form = "text"
        if form == "text":
            rendered = self._render_text(plain_text(record))
        else:
            messages = read_messages(record, form, prompts=self.prompts)
            tools = read_tools(record)
            rendered = self._render_chat(messages, tools, form) if messages else Rendered(form)
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                "it contains a lone surrogate (half a character), or is not UTF-8"
            ) from error
        return replace(rendered, unread=record.unread)

    def _render_text(self, text: str) -> Rendered:
        """Return a text with turn headers as it is, and any other text as plain text."""
        if not text.strip():
            return Rendered("text")
        if not any(match["open"] in self._added for match in TURN_TAG.finditer(text)):
            return Rendered("text", text, [(0, len(text), "text")], plain=True)
        text = cut_at_reply(text) if self.prompts else text
        return Rendered("text", text, role_spans(text, "text"))

    def _render_chat(self, messages: list[Message], tools: list[Any], form: str) -> Rendered:
        text = self._apply(messages, tools)
        marked = _mark(messages)
        pieces = self._split_at_marks(json.dumps([marked.messages, tools], default=str))
        without = pieces
        if tools:
            without = self._split_at_marks(json.dumps([marked.messages, []], default=str))
        spans, n_left_out = _fill_marks(pieces, marked, text)
        n_unknown = len(marked.n_before_call)
        if spans is None:
            spans, n_unknown = _search_parts(text, marked)
            n_left_out = 0
            n_unknown += pieces != without
        elif pieces[1::2] == without[1::2]:
            spans = sorted(spans + _tool_spans(pieces, without, marked, text))
        else:
            n_unknown += 1
        if not spans and not self._takes_parts:  # a template for images may ignore plain strings
            self._takes_parts = True
            return self._render_chat(messages, tools, form)
        if not spans:
            raise RecordError("the chat template omits everything that its messages say")
        n_left_out += bool(tools) and pieces == without
        if marked.parts and marked.parts[0][1] != "system":
            spans = self._template_system(text[: spans[0][0]]) + spans
        end = S1_THINK if form == "s1" and self.prompts else ""
        return Rendered(form, text + end, spans, False, n_unknown, n_left_out)

    def _apply(self, messages: list[Message], tools: list[Any]) -> str:
        """Return the messages rendered with the chat template, at a fixed date."""
        if self.tokenizer.chat_template is None:
            raise DatasetError(
                "the tokenizer has no chat template, which messages need; give records with a text "
                "field, or name one with --columns text=COLUMN"
            )
        if self._takes_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if "content" in m else m
                for m in messages
            ]
        template = str(self.tokenizer.get_chat_template())
        if "strftime_now" in template:
            template = _fixed_date() + template
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools or None,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=self.prompts,
                )
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise RecordError(
                f"the chat template rejects its messages ({first_line(error)})"
            ) from error

    def _uncached_split(self, marked_json: str) -> list[str]:
        """Return the template's own text and the numbers of the marks, alternating."""
        return re.split("\x02([0-9]+)\x03", self._apply(*json.loads(marked_json)))

    def _find_template_system(self, prefix: str) -> list[Span]:
        """Find the system prompt that the template itself puts before the first message.

        `prefix` is the text before that message. Remove special tokens, header names, and the text
        that the template also writes before a later question. What is left is the system prompt.
        """
        turns = ("user", "assistant", "user")
        try:
            chat = _mark([{"role": turn, "content": "x"} for turn in turns])
            between = self._split_at_marks(json.dumps([chat.messages, []]))[4]
        except (RecordError, IndexError):  # the template takes one question only, or writes nothing
            between = ""
        end = len(prefix) - _n_common(prefix[::-1], between[::-1])
        spans, start = [], 0
        for token, after in [*(m.span() for m in self._special.finditer(prefix)), (end, end)]:
            stop = min(token, end)  # two special tokens may end in the same letters
            first, _, rest = prefix[start:stop].partition("\n")
            if first.strip() in ROLE_OF_SPEAKER:
                start = stop - len(rest)
            spans += stripped_span(prefix, start, stop, "system")
            start = after
        return spans


def _mark(messages: list[Message]) -> _Marked:
    """Replace each part of the messages by a numbered mark."""
    marked = _Marked()
    for message in messages:
        copy = dict(message)
        for name, spans in field_spans(message).items():
            text, kept, last = message.get(name) or "", "", 0
            for start, stop, role in spans:
                kept += f"{text[last:start]}\x02{len(marked.parts)}\x03"
                marked.parts.append((text[start:stop], role))
                last = stop
            if name in message:
                copy[name] = kept + text[last:]
        if "thinking" in copy:
            copy["thinking"] = copy["reasoning_content"]
        if "tool_calls" in message:
            marked.n_before_call.append(len(marked.parts))
        marked.messages.append(copy)
    return marked


def _fill_marks(pieces: list[str], marked: _Marked, text: str) -> tuple[list[Span] | None, int]:
    """Return the spans of the parts, and how many parts are left out (step 3).

    The spans are None if the filled text differs from `text`.
    """
    filled, spans, position = [], [], 0
    edges: dict[int, tuple[int, int]] = {}
    for i, piece in enumerate(pieces):
        part = piece
        if i % 2:
            part, role = marked.parts[int(piece)]
            edges[int(piece)] = (position, position + len(part))
            spans.append((position, position + len(part), role))
        filled.append(part)
        position += len(part)
    if "".join(filled) != text:
        return None, 0
    for n_before in marked.n_before_call:
        start = max((stop for i, (_, stop) in edges.items() if i < n_before), default=0)
        stop = min((start for i, (start, _) in edges.items() if i >= n_before), default=len(text))
        spans.append((start, stop, "text"))
    return sorted(spans), len(marked.parts) - len(edges)


def _tool_spans(pieces: list[str], without: list[str], marked: _Marked, text: str) -> list[Span]:
    """Return the spans of what the template says about tools: the text that tools add.

    What comes before the first part is found with the template's system prompt.
    """
    spans: list[Span] = []
    position = 0
    for i, (piece, plain) in enumerate(zip(pieces, without, strict=True)):
        if i % 2:
            position += len(marked.parts[int(piece)][0])
            continue
        if piece != plain and (i or marked.parts[0][1] == "system"):
            before = _n_common(piece, plain)
            after = _n_common(piece[before:][::-1], plain[before:][::-1])
            stop = position + len(piece) - after
            spans += stripped_span(text, position + before, stop, "system")
        position += len(piece)
    return spans


def _n_common(first: str, second: str) -> int:
    """Return how many characters two texts begin with in common."""
    return len(commonprefix([first, second]))  # noqa: RUF071 (these are no paths)


def _search_parts(text: str, marked: _Marked) -> tuple[list[Span], int]:
    """Return the spans of parts that occur once and of gaps, and how many parts are lost (step 4).

    A gap is the text around a part that was not found, or around a tool call.
    """
    spans: list[Span] = []
    position, n_unknown, in_gap = 0, len(marked.n_before_call), False
    for i, (part, role) in enumerate(marked.parts):
        start = text.find(part, position)
        in_gap |= i in marked.n_before_call
        if start < 0 or text.find(part, start + 1) >= 0:
            n_unknown, in_gap = n_unknown + 1, True
            continue
        if in_gap:
            spans.append((position, start, "text"))
        position, in_gap = start + len(part), False
        spans.append((start, position, role))
    if in_gap or len(marked.parts) in marked.n_before_call:
        spans.append((position, len(text), "text"))
    return spans, n_unknown


def _fixed_date() -> str:
    """Return a macro that replaces the clock which transformers offers to templates."""
    dated = "format" + "".join(f'.replace("{code}", "{day}")' for code, day in _DATE.items())
    macro = "{%- macro strftime_now(format) -%}{{ " + dated + " }}{%- endmacro %}"
    return macro + "{{ '' }}"  # keeps Jinja from eating a line break at the template's start
