"""What a record says: its form by its fields, its messages, and who speaks where.

1. `form_of` goes by the fields: s1, chat or text.
2. `messages_of` gives the messages of an s1 or chat record, whatever its fields are called.
3. `sections` finds who speaks in a text with turn headers and think tags. The same function reads
   an assistant's message, a text that is rendered already, and what a model wrote.

The s1 form is the one that s1 models are trained on (simplescaling/s1, `data/tokenization.py`): the
tokenizer's chat template around the question, then `<|im_start|>think` and `<|im_start|>answer`
inside the assistant's turn, the answer led by `Answer: ` where it does not say so itself.
"""

import re
from collections.abc import Sequence
from typing import Any

from lorascope.texts.records import Record, RecordError

Span = tuple[int, int, str]  # start, stop, role
Message = dict[str, Any]
S1_THINK = "<|im_start|>think\n"
_S1_ANSWER = "<|im_start|>answer\n"
_S1 = (
    ("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
    ("question", "thinking_trajectories", "attempt"),
)
_PAIRS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("problem", "solution"),
    ("query", "response"),
)
_TEXTS = ("text", "content")
_TURNS = ("messages", "conversations")
_SHARED_AS = {  # who speaks in ShareGPT's `from`
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_SPEAKERS = ("system", "developer", "user", "assistant", "tool")

ROLE_OF = {
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
# The headers of ChatML, Llama 3 and Gemma, with s1's inside the assistant's turn, and think tags.
MARK = re.compile(
    r"(?P<open><\|im_start\|>|<\|start_header_id\|>|<start_of_turn>)"
    rf"(?P<name>{'|'.join(ROLE_OF)})(?:<\|end_header_id\|>)?(?=\n|\Z)"
    r"|(?P<close><\|im_end\|>|<\|eot_id\|>|<end_of_turn>)"
    r"|<(?P<slash>/?)think>"
)


def form_of(record: Record, *, prompts: bool = False) -> str:
    """Return the template that a record's fields ask for: `s1`, `chat` or `text`.

    For `prompts` a question without its answer is enough. Raises RecordError when none fits.
    """
    fields = record.keys()
    if any(set(names) <= fields for names in _S1):
        return "s1"
    if any(name in fields for name in _TURNS) or _pair_of(record, prompts=prompts):
        return "chat"
    if any(name in fields for name in _TEXTS):
        return "text"
    raise RecordError(
        f"it has the fields {_fields(record)}; expected text, messages, question + answer or "
        f"another pair, or {' + '.join(_S1[0])}"
    )


def text_of(record: Record) -> str:
    """Return the plain text of a record, from `text` or `content`."""
    return _string(record, next((name for name in _TEXTS if name in record), _TEXTS[0]))


def messages_of(record: Record, form: str, *, prompts: bool = False) -> list[Message]:
    """Return the messages of a record, each with a string or, beside tool calls, no content.

    For `prompts` they end where the assistant's last turn begins. A record whose parts are blank
    has none. Raises RecordError when fields are missing or hold something else.
    """
    if form == "s1":
        return _s1_messages(record, prompts=prompts)
    name = next((name for name in _TURNS if name in record), None)
    if name is not None:
        messages = _messages(record[name], name)
    else:
        pair = _pair_of(record, prompts=prompts)
        if pair is None:
            raise RecordError(
                f"it has no messages and no question + answer; it has {_fields(record)}"
            )
        messages = _pair_messages(record, pair, prompts=prompts)
    if prompts:
        while messages and ROLE_OF.get(messages[-1]["role"]) == "answer":
            messages.pop()
        if not messages and name is not None and record[name]:
            raise RecordError("nothing stands before the assistant's turn")
    said = any("tool_calls" in m or m["content"].strip() for m in messages)
    return messages if said else []


def sections(text: str, role: str, white: str | None = None) -> list[Span]:
    """Return the spans of what is said in a text that begins in the turn of `role`.

    Headers, think tags, and white space (`white`; by default all that Python calls so) at the ends
    of a section are in no span. What follows the end of a turn is `text`.
    """
    spans: list[Span] = []
    start, tagged = 0, False
    for match in MARK.finditer(text):
        if match["slash"] is None:
            spans += _section(text, start, match.start(), role, white)
            role, tagged = ROLE_OF[match["name"]] if match["name"] else "text", False
        elif role in ("think", "answer"):
            # Where the prompt held the opening tag, the text has the closing one alone.
            said = "think" if match["slash"] and not tagged else role
            spans += _section(text, start, match.start(), said, white)
            role, tagged = "answer" if match["slash"] else "think", True
        else:
            continue  # the tag is something that a user wrote
        start = match.end()
    return spans + _section(text, start, len(text), role, white)


def _section(text: str, start: int, stop: int, role: str, white: str | None) -> list[Span]:
    said = text[start:stop]
    start += len(said) - len(said.lstrip(white))
    said = said.strip(white)
    return [(start, start + len(said), role)] if said else []


def _fields(record: Record) -> str:
    return ", ".join(sorted(map(str, record))) or "none"


def _string(record: Record, name: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        return value
    if name in record:
        raise RecordError(f"field {name} is {type(value).__name__}, expected text")
    raise RecordError(f"field {name} is missing; it has {_fields(record)}")


def _pair_of(record: Record, *, prompts: bool) -> tuple[str, str] | None:
    """Return the first pair of fields that a record has; of `prompts`, the first half will do."""
    whole = next((pair for pair in _PAIRS if set(pair) <= record.keys()), None)
    if whole is None and prompts:
        return next((pair for pair in _PAIRS if pair[0] in record), None)
    return whole


def _s1_messages(record: Record, *, prompts: bool) -> list[Message]:
    names = next((names for names in _S1 if set(names) <= record.keys()), None)
    if names is None:
        raise RecordError(f"it lacks the s1 fields {' + '.join(_S1[0])}; it has {_fields(record)}")
    question = _string(record, names[0])
    messages: list[Message] = [{"role": "user", "content": question}]
    if not prompts:
        trace = record[names[1]]
        if isinstance(trace, list) and all(isinstance(piece, str) for piece in trace):
            record = {**record, names[1]: "\n".join(trace)}
        thinking, attempt = (_string(record, name) for name in names[1:])
        if not thinking.strip() or not attempt.strip():
            return []
        answer = attempt if "Answer:" in attempt else "Answer: " + attempt
        content = f"{S1_THINK}{thinking.strip()}\n{_S1_ANSWER}{answer.strip()}"
        messages.append({"role": "assistant", "content": content})
    return messages if question.strip() else []


def _pair_messages(record: Record, pair: tuple[str, str], *, prompts: bool) -> list[Message]:
    if isinstance(record[pair[0]], list):  # as TRL writes it: both are lists of messages
        messages = _messages(record[pair[0]], pair[0])
        return messages if prompts else messages + _messages(record[pair[1]], pair[1])
    asked = _string(record, pair[0])
    more = record.get("input") if pair[0] == "instruction" else None
    if isinstance(more, str) and more.strip():
        asked = f"{asked}\n\n{more}"
    messages: list[Message] = [{"role": "user", "content": asked}]
    if not prompts:
        messages.append({"role": "assistant", "content": _string(record, pair[1])})
    return messages if all(message["content"].strip() for message in messages) else []


def _messages(found: Any, name: str) -> list[Message]:
    if not isinstance(found, list):
        raise RecordError(f"field {name} is {type(found).__name__}, expected a list of messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(found)]


def _message(found: Any, where: str) -> Message:
    """Return a message with role and content, without the keys that Arrow filled with None."""
    if not isinstance(found, dict):
        raise RecordError(f"{where} is {type(found).__name__}, expected role and content")
    message = {key: value for key, value in found.items() if value is not None}
    if "from" in message:
        speaker = message.pop("from")
        message["role"] = _SHARED_AS.get(speaker, speaker)
        message["content"] = message.pop("value", None)
        if message["role"] not in _SPEAKERS:
            raise RecordError(f"{where} is from {speaker!r}, expected human, gpt or system")
    if not isinstance(message.get("role"), str):
        raise RecordError(f"{where} has no role; it has {_fields(message)}")
    if "tool_calls" not in message or "content" in message:
        message["content"] = _content(message.get("content"), where)
    thought = [name for name in ("reasoning_content", "thinking") if name in message]
    if thought:  # templates read one name or the other
        if not isinstance(message[thought[0]], str):
            raise RecordError(f"{where}: {thought[0]} is no text")
        message["reasoning_content"] = message["thinking"] = message[thought[0]]
    return message


def _content(found: Any, where: str) -> str:
    if isinstance(found, str):
        return found
    if not isinstance(found, list):
        raise RecordError(f"{where}: content is {type(found).__name__}, expected text")
    return "".join(_part(part, where) for part in found)


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RecordError(f"{where}: content has a part of type {kind}, expected text")


def up_to_reply(text: str) -> str:
    """Return a rendered text up to where the assistant's last turn begins, if there is one."""
    headers = [match for match in MARK.finditer(text) if match["name"] in ("assistant", "model")]
    if not headers:
        return text
    stop = headers[-1].end()
    stop += len(text[stop:]) - len(text[stop:].lstrip("\n"))
    return text[:stop] + S1_THINK * text[stop:].startswith(S1_THINK)


def spoken(message: Message) -> dict[str, Sequence[Span]]:
    """Return the spans of what is said in each field of a message that a template may show."""
    content = message.get("content", "")
    role = ROLE_OF.get(message["role"], "user")
    if role != "answer":
        return {"content": _section(content, 0, len(content), role, None)}
    thinking = message.get("reasoning_content", "")
    return {
        "reasoning_content": _section(thinking, 0, len(thinking), "think", None),
        "content": sections(content, "answer"),
    }
