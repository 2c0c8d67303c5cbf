"""Read what a record says: its form, its plain text or its messages.

1. `detect_form` decides by the record's fields: s1, chat or text.
2. `read_messages` returns the messages of an s1 or chat record, whatever its fields are called, and
   `read_tools` the tools that they may call.
3. `field_spans` says which role speaks where in each field of a message.

The s1 form is the training format of s1 models (simplescaling/s1, `data/tokenization.py`): the
tokenizer's chat template around the question, then `<|im_start|>think` and `<|im_start|>answer`
inside the assistant's turn. The answer begins with `Answer: ` unless it contains `Answer:` already.
"""

import json
from collections.abc import Sequence
from typing import Any

from lorascope.config import did_you_mean
from lorascope.errors import ConfigError
from lorascope.texts.records import Record, RecordError
from lorascope.texts.roles import ROLE_OF_SPEAKER, TURN_TAG, Span, role_spans, stripped_span

Message = dict[str, Any]
S1_THINK = "<|im_start|>think\n"
_S1_ANSWER = "<|im_start|>answer\n"
_S1_FIELDS = (
    ("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
    ("question", "thinking_trajectories", "attempt"),
)
_PAIR_FIELDS = (
    *((question, answer) for question, answers in {
        "question": ("answer", "response"),
        "prompt": ("completion", "response"),
        "instruction": ("output", "response"),
        "problem": ("solution",),
        "query": ("response",),
        "input": ("output",),
    }.items() for answer in answers),
    *((question, "chosen") for question in ("prompt", "question", "instruction", "input")),
)  # fmt: skip
_TEXT_FIELDS = ("text", "content", "chosen")  # `chosen` of the form of Anthropic's HH is one text
_TURN_FIELDS = ("messages", "conversations")
_CONTEXT_FIELDS = ("input", "context")  # of Alpaca and of Dolly: what the question is about
_SYSTEM_FIELDS = ("system", "system_prompt")
FIELDS = {  # all that are read
    *_TEXT_FIELDS, *_TURN_FIELDS, *_CONTEXT_FIELDS, *_SYSTEM_FIELDS, "history", "tools",
    *(name for names in (*_S1_FIELDS, *_PAIR_FIELDS) for name in names),
}  # fmt: skip
_SHAREGPT_ROLES = {  # by the values of ShareGPT's field `from`
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
_CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Return the column of each field from `FIELD=COLUMN`. Raises ConfigError for other words."""
    names: dict[str, str] = {}
    for word in columns:
        name, sign, column = word.partition("=")
        if not sign or not column or name not in FIELDS or name in names:
            raise ConfigError(
                f"--columns has {word!r}, expected FIELD=COLUMN with each field once; fields are "
                f"{', '.join(sorted(FIELDS))}{did_you_mean(name, FIELDS - names.keys())}"
            )
        names[name] = column
    return names


def detect_form(record: Record, *, prompts: bool = False) -> str:
    """Return the form that a record's fields imply: `s1`, `chat` or `text`.

    With `prompts`, a question without an answer is enough. Raises RecordError when no form fits.
    """
    fields = record.keys()
    if any(set(names) <= fields for names in _S1_FIELDS):
        return "s1"
    if any(name in fields for name in _TURN_FIELDS) or _find_pair(record, prompts=prompts):
        return "chat"
    if "chosen" in fields and isinstance(record["chosen"], list):
        return "chat"
    if has_text(record):
        return "text"
    if not record:
        raise RecordError("all its fields are empty")
    example = next((name for name, value in record.items() if isinstance(value, str)), "COLUMN")
    raise RecordError(
        f"it has the fields {_fields(record)}; expected text, messages, question + answer or "
        f"another pair, or {' + '.join(_S1_FIELDS[0])}; name others with --columns, such as "
        f"--columns text={example}"
    )


def has_text(record: Record) -> bool:
    """Return whether a record has a field of plain text."""
    return any(name in record for name in _TEXT_FIELDS)


def plain_text(record: Record) -> str:
    """Return the plain text of a record."""
    return _string(record, next((name for name in _TEXT_FIELDS if name in record), _TEXT_FIELDS[0]))


def read_messages(record: Record, form: str, *, prompts: bool = False) -> list[Message]:
    """Return the messages of a record. Content is a string; only tool calls may have none.

    With `prompts`, the messages end before the assistant's last turn. The list is empty if the
    record's fields are blank. Raises RecordError when fields are missing or of a wrong type.
    """
    pair = _find_pair(record, prompts=prompts)
    turns = next((name for name in _TURN_FIELDS if name in record), None)
    if turns is None and pair is None and "chosen" in record:
        turns = "chosen"
    if form == "s1":
        messages = _s1_messages(record, prompts=prompts)
    elif turns is not None:
        messages = _messages(record[turns], turns)
        if messages and not _is_reply(messages[-1]) and turns != "chosen" and "chosen" in record:
            messages += _reply(record, "chosen")
    elif pair is not None:
        messages = _pair_messages(record, pair, prompts=prompts)
    else:
        raise RecordError(
            f"it has neither messages nor question + answer; it has {_fields(record)}; name "
            "others with --columns question=COLUMN answer=COLUMN"
        )
    if prompts:
        while messages and _is_reply(messages[-1]):
            messages.pop()
        if not messages and turns is not None and record[turns]:
            raise RecordError("no message comes before the assistant's turn")
    if not any("tool_calls" in m or m["content"].strip() for m in messages):
        return []
    if ROLE_OF_SPEAKER.get(messages[0]["role"]) != "system":
        messages = [*_system_message(record), *messages]
    return messages


def read_tools(record: Record) -> list[Any]:
    """Return the tools that a record offers to the assistant, as chat templates expect them.

    LLaMA-Factory writes them as the JSON of a list of functions.
    """
    tools = record.get("tools") or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise RecordError(f"field tools is not JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(f"field tools is {type(tools).__name__}, expected a list of objects")
    return [
        {"type": "function", "function": tool}
        if "name" in tool and "function" not in tool
        else tool
        for tool in tools
    ]


def _is_reply(message: Message) -> bool:
    return ROLE_OF_SPEAKER.get(message["role"]) == "answer"


def _fields(record: Record) -> str:
    return ", ".join(sorted(map(str, record))) or "none"


def _string(record: Record, name: str) -> str:
    value = record.get(name)
    if isinstance(value, str):
        return value
    if name in record:
        raise RecordError(f"field {name} is {type(value).__name__}, expected text")
    raise RecordError(
        f"field {name} is missing; it has {_fields(record)}; --columns {name}=COLUMN names another"
    )


def _system_message(record: Record) -> list[Message]:
    """Return the system message that a record keeps in a field of its own, if it has one."""
    for name in _SYSTEM_FIELDS:
        if name in record and isinstance(record[name], str) and record[name].strip():
            return [{"role": "system", "content": record[name]}]
    return []


def _find_pair(record: Record, *, prompts: bool) -> tuple[str, str] | None:
    """Return the first pair of fields that a record has; `prompts` need only the first field."""
    whole = next((pair for pair in _PAIR_FIELDS if set(pair) <= record.keys()), None)
    if whole is None and prompts:
        return next((pair for pair in _PAIR_FIELDS if pair[0] in record), None)
    return whole


def _s1_messages(record: Record, *, prompts: bool) -> list[Message]:
    names = next((names for names in _S1_FIELDS if set(names) <= record.keys()), None)
    if names is None:
        raise RecordError(
            f"it lacks the s1 fields {' + '.join(_S1_FIELDS[0])}; it has {_fields(record)}"
        )
    question = _string(record, names[0])
    messages: list[Message] = [{"role": "user", "content": question}]
    if not prompts:
        trace = record[names[1]]
        pieces = isinstance(trace, list) and all(isinstance(piece, str) for piece in trace)
        thinking = "\n".join(trace) if pieces else _string(record, names[1])
        attempt = _string(record, names[2])
        if not thinking.strip() or not attempt.strip():
            return []
        answer = attempt if "Answer:" in attempt else "Answer: " + attempt
        content = f"{S1_THINK}{thinking.strip()}\n{_S1_ANSWER}{answer.strip()}"
        messages.append({"role": "assistant", "content": content})
    return messages if question.strip() else []


def _pair_messages(record: Record, pair: tuple[str, str], *, prompts: bool) -> list[Message]:
    asked, answered = pair
    if is_list := isinstance(record[asked], list):  # TRL's format: both are lists of messages
        messages = _messages(record[asked], asked)
    else:
        question = _string(record, asked)
        for name in _CONTEXT_FIELDS if asked in ("instruction", "question") else ():
            context = record.get(name)
            if isinstance(context, str) and context.strip():
                question = f"{question}\n\n{context}"
                break
        messages = [*_history(record), {"role": "user", "content": question}]
    if not prompts:
        reply = _reply(record, answered)
        if any(message["role"] == "user" for message in reply):
            return reply  # the whole conversation, as `chosen` often is
        messages += reply
    is_blank = any(not message.get("content", "a call").strip() for message in messages)
    return [] if is_blank and not is_list else messages


def _reply(record: Record, name: str) -> list[Message]:
    """Return the assistant's reply in a field: a text, a message or a list of messages."""
    value = record[name]
    if isinstance(value, dict | list):
        return _messages(value if isinstance(value, list) else [value], name)
    return [{"role": "assistant", "content": _string(record, name)}]


def _history(record: Record) -> list[Message]:
    """Return the earlier turns that Alpaca records keep apart, as pairs of question and answer."""
    history, messages = record.get("history", []), []
    if not isinstance(history, list):
        raise RecordError(f"field history is {type(history).__name__}, expected a list of pairs")
    for i, turn in enumerate(history):
        if not isinstance(turn, list) or list(map(type, turn)) != [str, str]:
            raise RecordError(f"history[{i}] is no pair of texts, expected question and answer")
        messages.append({"role": "user", "content": turn[0]})
        messages.append({"role": "assistant", "content": turn[1]})
    return messages


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise RecordError(f"field {name} is {type(value).__name__}, expected a list of messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    """Return a message with role and content, and without the None values that Arrow adds."""
    if not isinstance(value, dict):
        raise RecordError(f"{where} is {type(value).__name__}, expected role and content")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message:
        speaker = message.pop("from")
        message["role"] = _SHAREGPT_ROLES.get(str(speaker), speaker)
        message["content"] = message.pop("value", None)
        if message["role"] not in _CHAT_ROLES:
            raise RecordError(f"{where} is from {speaker!r}, expected human, gpt or system")
    if not isinstance(message.get("role"), str):
        raise RecordError(f"{where} has no role; it has {_fields(message)}")
    if "tool_calls" not in message or "content" in message:
        message["content"] = _content(message.get("content"), where)
    thinking_fields = [name for name in ("reasoning_content", "thinking") if name in message]
    if thinking_fields:  # templates read one name or the other
        if not isinstance(message[thinking_fields[0]], str):
            raise RecordError(f"{where}: {thinking_fields[0]} is not text")
        message["reasoning_content"] = message["thinking"] = message[thinking_fields[0]]
    return message


def _content(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RecordError(f"{where}: content is {type(value).__name__}, expected text")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RecordError(f"{where}: content has a part of type {kind}, expected text")
    return "".join(part["text"] for part in value)


def cut_at_reply(text: str) -> str:
    """Return a rendered text up to where the assistant's last turn begins, or all if it has none.

    The turn's header is kept, and so is s1's think header right after it.
    """
    headers = [tag for tag in TURN_TAG.finditer(text) if tag["name"] in ("assistant", "model")]
    if not headers:
        return text
    stop = headers[-1].end()
    stop += len(text[stop:]) - len(text[stop:].lstrip("\n"))
    return text[:stop] + S1_THINK * text[stop:].startswith(S1_THINK)


def field_spans(message: Message) -> dict[str, Sequence[Span]]:
    """Return the spans of speech in each field of a message that a template may show."""
    content = message.get("content", "")
    role = ROLE_OF_SPEAKER.get(message["role"], "user")
    if role != "answer":
        return {"content": stripped_span(content, 0, len(content), role)}
    thinking = message.get("reasoning_content", "")
    return {
        "reasoning_content": stripped_span(thinking, 0, len(thinking), "think"),
        "content": role_spans(content, "answer"),
    }
