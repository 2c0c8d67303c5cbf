"""Render records with a tokenizer's chat template, and know where each part of them went.

1. The messages are rendered. This is the text that the model is run on.
2. They are rendered once more with a mark in place of each part: what is said in a message, white
   space around it left out. Messages of the same shape share that rendering.
3. Put the parts where the marks stand: if the text of step 1 comes out, every part's place is
   known, whatever its words are. A part whose mark is gone was left out by the template.
4. Else the template rewrites what is said. Parts that occur once in what follows the part before
   are found by search; what lies between those that are found has the role `text`.

What the template itself writes is in no span, except its own system prompt.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import takewhile
from typing import Any

from lorascope.errors import DatasetError
from lorascope.texts.conversations import (
    MARK,
    ROLE_OF,
    S1_THINK,
    Message,
    Span,
    form_of,
    messages_of,
    sections,
    spoken,
    text_of,
    up_to_reply,
)
from lorascope.texts.records import Record, RecordError
from lorascope.texts.tokens import special_ids

# Templates that write today's date would give another text every day. The 26th of July 2024 is
# what Llama 3's own template falls back to.
_DATE = {"%d": "26", "%-d": "26", "%e": "26", "%m": "07", "%-m": "7", "%y": "24", "%Y": "2024"}
_DATE |= {"%b": "Jul", "%B": "July", "%a": "Fri", "%A": "Friday", "%H": "12", "%M": "00"}
_DATE |= {"%S": "00", "%I": "12", "%p": "PM", "%F": "2024-07-26"}


@dataclass(frozen=True)
class Rendered:
    """A text as the model reads it, and the spans of what is said in it; empty without a text.

    A `plain` text still gets the special tokens that the tokenizer puts around every text. Of the
    parts of its messages the template rewrites `n_unknown` and leaves out `n_left_out`.
    """

    form: str
    text: str = ""
    spans: Sequence[Span] = ()
    plain: bool = False
    n_unknown: int = 0
    n_left_out: int = 0


@dataclass
class _Parts:
    """Messages with marks for parts; `hidden`: how many parts stand before each tool call."""

    marked: list[Message] = field(default_factory=list)
    said: list[tuple[str, str]] = field(default_factory=list)  # part, role
    hidden: list[int] = field(default_factory=list)


class Renderer:
    """Renders records; with `prompts`, up to where the assistant's last turn begins."""

    def __init__(self, tokenizer: Any, template: str, *, prompts: bool = False) -> None:
        self.tokenizer, self.template, self.prompts = tokenizer, template, prompts
        self._added = set(tokenizer.get_added_vocab())
        names = tokenizer.convert_ids_to_tokens(special_ids(tokenizer))
        longest_first = sorted(set(names), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._pieces = lru_cache(maxsize=256)(self._split)
        self._own_system = lru_cache(maxsize=256)(self._find_system)

    def render(self, record: Record) -> Rendered:
        """Return the text of a record; raise RecordError when it cannot be had."""
        form = self.template
        if form == "auto":
            form = form_of(record, prompts=self.prompts)
        if form == "text":
            rendered = self._render_text(text_of(record))
        else:
            messages = messages_of(record, form, prompts=self.prompts)
            rendered = self._render_chat(messages, form) if messages else Rendered(form)
        try:
            rendered.text.encode()
        except UnicodeEncodeError as error:
            raise RecordError("it has a lone surrogate: half a character, or not UTF-8") from error
        return rendered

    def _render_text(self, text: str) -> Rendered:
        """Return a text that is rendered already as it is, and any other one as plain text."""
        if not text.strip():
            return Rendered("text")
        if not any(match["open"] in self._added for match in MARK.finditer(text)):
            return Rendered("text", text, [(0, len(text), "text")], plain=True)
        text = up_to_reply(text) if self.prompts else text
        return Rendered("text", text, sections(text, "text"))

    def _render_chat(self, messages: list[Message], form: str) -> Rendered:
        text = self._apply(messages)
        parts = _mark(messages)
        pieces = self._pieces(json.dumps(parts.marked, default=str))
        spans, left_out = _place(pieces, parts, text)
        n_unknown = len(parts.hidden)
        if spans is None:
            spans, n_unknown = _search(text, parts)
            left_out = 0
        if not spans:  # a template for images may want lists of parts, and skip mere strings
            raise RecordError("the chat template leaves out all that its messages say")
        if parts.said and parts.said[0][1] != "system":
            spans = self._own_system(text[: spans[0][0]]) + spans
        end = S1_THINK if form == "s1" and self.prompts else ""
        return Rendered(form, text + end, spans, False, n_unknown, left_out)

    def _apply(self, messages: list[Message]) -> str:
        """Return what the chat template makes of messages, on a fixed date."""
        import jinja2

        if self.tokenizer.chat_template is None:
            raise DatasetError(
                "the tokenizer has no chat template, which messages need; give --template text and "
                "records with a text field"
            )
        template = str(self.tokenizer.get_chat_template())
        if "strftime_now" in template:
            template = _fixed_date() + template
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=self.prompts,
                )
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RecordError(f"the chat template refuses its messages ({reason})") from error

    def _split(self, marked: str) -> list[str]:
        """Return what the template writes and the numbers of the marks between, in turn."""
        return re.split("\x02([0-9]+)\x03", self._apply(json.loads(marked)))

    def _find_system(self, prefix: str) -> list[Span]:
        """Find the system prompt that the template itself puts before the first message.

        It is what is left of the text before that message without special tokens, the words of
        headers, and what the template also writes before any later question.
        """
        turns = ("user", "assistant", "user")
        try:
            chat = _mark([{"role": turn, "content": "x"} for turn in turns])
            between = self._pieces(json.dumps(chat.marked))[4]
        except (RecordError, IndexError):  # it takes a single question only, or writes none
            between = ""
        backwards = zip(reversed(prefix), reversed(between), strict=False)
        n_header = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
        end = len(prefix) - n_header
        spans: list[Span] = []
        start = 0
        for token, after in [*(m.span() for m in self._special.finditer(prefix)), (end, end)]:
            stop = min(token, end)  # the last letters of two special tokens may be the same
            piece = prefix[start:stop]
            first, _, rest = piece.partition("\n")
            said = rest if first.strip() in ROLE_OF else piece
            if said.strip():
                begin = stop - len(said.lstrip())
                spans.append((begin, begin + len(said.strip()), "system"))
            start = after
        return spans


def _mark(messages: list[Message]) -> _Parts:
    """Put a numbered mark in place of each part of the messages."""
    parts = _Parts()
    for message in messages:
        marked = dict(message)
        for name, spans in spoken(message).items():
            text, kept, last = message.get(name) or "", "", 0
            for start, stop, role in spans:
                kept += f"{text[last:start]}\x02{len(parts.said)}\x03"
                parts.said.append((text[start:stop], role))
                last = stop
            if name in message:
                marked[name] = kept + text[last:]
        if "thinking" in marked:
            marked["thinking"] = marked["reasoning_content"]
        if "tool_calls" in message:
            parts.hidden.append(len(parts.said))
        parts.marked.append(marked)
    return parts


def _place(pieces: list[str], parts: _Parts, text: str) -> tuple[list[Span] | None, int]:
    """Return the spans of the parts and how many are left out; None where the text is another."""
    built, spans, at = [], [], 0
    edges: dict[int, tuple[int, int]] = {}
    for i, piece in enumerate(pieces):
        said = piece
        if i % 2:
            said, role = parts.said[int(piece)]
            edges[int(piece)] = (at, at + len(said))
            spans.append((at, at + len(said), role))
        built.append(said)
        at += len(said)
    if "".join(built) != text:
        return None, 0
    for n_before in parts.hidden:
        start = max((stop for i, (_, stop) in edges.items() if i < n_before), default=0)
        stop = min((start for i, (start, _) in edges.items() if i >= n_before), default=len(text))
        spans.append((start, stop, "text"))
    return sorted(spans), len(parts.said) - len(edges)


def _search(text: str, parts: _Parts) -> tuple[list[Span], int]:
    """Return the spans of parts that occur once, of what lies between them, and how many do not."""
    spans: list[Span] = []
    position, n_unknown, unknown = 0, len(parts.hidden), False
    for i, (part, role) in enumerate(parts.said):
        start = text.find(part, position)
        unknown |= i in parts.hidden
        if start < 0 or text.find(part, start + 1) >= 0:
            n_unknown, unknown = n_unknown + 1, True
            continue
        if unknown:
            spans.append((position, start, "text"))
        position, unknown = start + len(part), False
        spans.append((start, position, role))
    if unknown or len(parts.said) in parts.hidden:
        spans.append((position, len(text), "text"))
    return spans, n_unknown


def _fixed_date() -> str:
    """Return a macro that stands in for the clock which transformers gives to templates."""
    dated = "format" + "".join(f'.replace("{code}", "{day}")' for code, day in _DATE.items())
    macro = "{%- macro strftime_now(format) -%}{{ " + dated + " }}{%- endmacro %}"
    return macro + "{{ '' }}"  # keeps Jinja from eating a line break at the template's start
