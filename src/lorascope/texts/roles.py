"""Who speaks where: the roles that every token of a store has, and the tags that delimit them.

1. `role_spans` finds who speaks in a text with turn headers and think tags. The same function reads
   an assistant's message, a text that is already rendered, and what a model generated.
2. `token_roles` gives each token the role of its first character that lies in a span.
3. `has_role` finds the tokens of some roles.
"""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorascope.config import did_you_mean
from lorascope.errors import ConfigError

ROLES = ("system", "user", "think", "answer", "special", "text")
SPECIAL = ROLES.index("special")

Span = tuple[int, int, str]  # start, stop, role
Roles = npt.NDArray[np.uint8]  # indices into ROLES

ROLE_OF_SPEAKER = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "user",
    "ipython": "user",
    "assistant": "answer",
    "model": "answer",
    "think": "think",
    "answer": "answer",
}
# Turn headers of ChatML, Llama 3 and Gemma, s1's headers inside the assistant's turn, think tags.
TURN_TAG = re.compile(
    r"(?P<open><\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)"
    rf"(?P<name>{'|'.join(ROLE_OF_SPEAKER)})(?:<\|end_header_id\|>)?(?=\n|\Z)"
    r"|(?P<close><\|im_end\|>|<\|eot_id\|>|<end_of_turn>)"
    r"|<(?P<slash>/?)think>"
)


def role_spans(text: str, role: str, whitespace: str | None = None) -> list[Span]:
    """Return the spans of speech in a text that begins in the turn of `role`.

    Headers, think tags, and whitespace at both ends of a span (`whitespace`; default: what Python
    strips) belong to no span. Text after the end of a turn has the role `text`.
    """
    spans: list[Span] = []
    start, tagged = 0, False
    for tag in TURN_TAG.finditer(text):
        if tag["slash"] is None:
            spans += stripped_span(text, start, tag.start(), role, whitespace)
            role, tagged = ROLE_OF_SPEAKER[tag["name"]] if tag["name"] else "text", False
        elif role in ("think", "answer"):
            # If the prompt held the opening tag, the text has only the closing one.
            before_tag = "think" if tag["slash"] and not tagged else role
            spans += stripped_span(text, start, tag.start(), before_tag, whitespace)
            role, tagged = "answer" if tag["slash"] else "think", True
        else:
            continue  # a user wrote the tag
        start = tag.end()
    return spans + stripped_span(text, start, len(text), role, whitespace)


def stripped_span(
    text: str, start: int, stop: int, role: str, whitespace: str | None = None
) -> list[Span]:
    """Return the span of `text[start:stop]` without whitespace at its ends; none if blank."""
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip(whitespace))
    piece = piece.strip(whitespace)
    return [(start, start + len(piece), role)] if piece else []


def token_roles(
    n_characters: int,
    spans: Sequence[Span],
    starts: npt.NDArray[np.int64],
    stops: npt.NDArray[np.int64],
) -> Roles:
    """Return the role of each token `[start, stop)`: that of its first character in a span.

    A token's first character may be the space before a word, which is in no span. Tokens that
    touch no span are `special`.
    """
    by_character = np.full(n_characters + 1, SPECIAL, np.uint8)
    for start, stop, role in spans:
        by_character[start:stop] = ROLES.index(role)
    positions = np.where(by_character == SPECIAL, n_characters, np.arange(n_characters + 1))
    next_in_span = np.minimum.accumulate(positions[::-1])[::-1]
    first = next_in_span[starts]
    return by_character[np.where(first < stops, first, starts)]


def has_role(roles: Roles, names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which tokens have one of the named roles. Raises ConfigError for an unknown name.

    No name means all but special, as in the settings of SAEs that older versions trained.
    """
    for name in names:
        if name not in ROLES:
            raise ConfigError(
                f"unknown role {name}, expected {', '.join(ROLES)}{did_you_mean(name, ROLES)}"
            )
    return np.isin(roles, [ROLES.index(name) for name in names]) if names else roles != SPECIAL
