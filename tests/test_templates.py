import json
import re

import pytest
from builders.records import CHAT_TEMPLATE, s1_records

from lorascope.errors import ConfigError, DatasetError
from lorascope.texts.conversations import detect_form, parse_columns
from lorascope.texts.records import RecordError
from lorascope.texts.roles import role_spans
from lorascope.texts.templates import Renderer

# Shortened from the models' own: what they do to messages is kept.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n{{ c.function.name }}\n"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "A chat between two.\n\n{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPECIAL = (
    "<|User|>", "<|Assistant|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip


@pytest.fixture
def tokenizer(tokenizer_dir):
    """The tests' tokenizer with every model's special tokens, and ChatML's template."""
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tokenizer_dir)
    fast.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": list(SPECIAL)})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def roles_in(tokenizer, record, template="auto", *, prompts=False):
    """Return `(role, text)` of every span, and the text."""
    rendered = Renderer(tokenizer, template, prompts=prompts).render(record)
    return [(role, rendered.text[start:stop]) for start, stop, role in rendered.spans], rendered


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


CHAT = chat(("user", "One?"), ("assistant", "Two."))
ALPACA = {"instruction": "One?", "output": "Two."}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
TOOLS = [{"type": "function", "function": ADD}]


def reference_s1(example, tokenizer):
    """`process_cot_example` of simplescaling/s1's data/tokenization.py, for a trace in one text."""
    answer = example["deepseek_attempt"]
    answer = "Answer: " + answer if "Answer:" not in answer else answer
    content = (
        "<|im_start|>think\n" + example["deepseek_thinking_trajectory"].strip()
        + "\n<|im_start|>answer\n" + answer.strip()
    )  # fmt: skip
    return tokenizer.apply_chat_template(
        [
            {"role": "user", "content": example["question"]},
            {"role": "assistant", "content": content},
        ],
        tokenize=False,
    )


@pytest.mark.parametrize("attempt", ["Answer: 1", "It is 1.", "\n It is 1.\n"])
def test_the_s1_text_is_the_one_that_s1_models_are_trained_on(tokenizer, attempt):
    record = {**s1_records(1)[0], "question": " Is\n it? ", "deepseek_attempt": attempt}
    spans, rendered = roles_in(tokenizer, record)
    assert rendered.text == reference_s1(record, tokenizer)
    assert spans == [
        ("system", "You help."),
        ("user", "Is\n it?"),
        ("think", record["deepseek_thinking_trajectory"]),
        ("answer", rendered.text.split("answer\n")[1].removesuffix("<|im_end|>\n")),
    ]


def test_older_s1_records_hold_the_trace_in_pieces(tokenizer):
    record = {"question": "Q", "thinking_trajectories": ["one", "two\n"], "attempt": "Answer: 3"}
    assert roles_in(tokenizer, record)[0][2:] == [("think", "one\ntwo"), ("answer", "Answer: 3")]


@pytest.mark.parametrize(
    "record",
    [
        {"question": "One?", "answer": "Two."},
        {"prompt": "One?", "completion": "Two."},
        {"prompt": "One?", "response": "Two."},
        {"instruction": "One?", "output": "Two.", "input": " "},
        {"problem": "One?", "solution": "Two.", "answer": 2},
        {"query": "One?", "response": "Two."},
        {"question": "One?", "response": "Two.", "system_prompt": ""},  # OpenOrca
        {"instruction": "One?", "context": "", "response": "Two.", "category": "qa"},  # Dolly
        {"prompt": "One?", "chosen": "Two.", "rejected": "Three."},
        {"prompt": "One?", "chosen": CHAT["messages"], "rejected": []},  # UltraFeedback
        {"prompt": CHAT["messages"][:1], "chosen": CHAT["messages"][1:], "rejected": []},  # TRL
        {"chosen": CHAT["messages"], "rejected": CHAT["messages"][:1]},
        {"conversations": [{"from": "human", "value": "One?"}],
         "chosen": {"from": "gpt", "value": "Two."}, "rejected": {"from": "gpt", "value": "3"}},
        chat(("user", "One?"), ("assistant", "Two.")),
        {"messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "On"}, {"type": "text", "text": "e?"},
            ], "tool_calls": None},
            {"role": "assistant", "content": " Two.\n", "reasoning_content": None},
        ]},
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}]},
        {"conversations": chat(("user", "One?"), ("assistant", "Two."))["messages"]},
        {"prompt": chat(("user", "One?"))["messages"],
         "completion": chat(("assistant", "Two."))["messages"]},
    ],
)  # fmt: skip
def test_every_way_to_write_a_question_and_its_answer_is_the_same_chat(tokenizer, record):
    spans, _ = roles_in(tokenizer, record)
    assert spans == [("system", "You help."), ("user", "One?"), ("answer", "Two.")]
    spans, rendered = roles_in(tokenizer, record, prompts=True)
    assert spans == [("system", "You help."), ("user", "One?")]
    assert rendered.text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},  # Alpaca
        {"instruction": "Add.", "context": "1, 2", "response": "3"},  # Dolly
    ],
)
def test_what_an_instruction_is_about_follows_it(tokenizer, record):
    spans, rendered = roles_in(tokenizer, record)
    assert spans[1:] == [("user", "Add.\n\n1, 2"), ("answer", "3")]
    assert rendered.unread == set()


@pytest.mark.parametrize(
    "record",
    [
        {**CHAT, "system": "Be brief."},
        {**ALPACA, "system": "Be brief."},
        {"question": "One?", "response": "Two.", "system_prompt": "Be brief.", "id": "flan.1"},
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "Two."}],
         "system": "Be brief."},
        {**s1_records(1)[0], "system": "Be brief."},
    ],
)  # fmt: skip
def test_a_system_prompt_in_a_field_of_its_own_is_read(tokenizer, record):
    spans, rendered = roles_in(tokenizer, record)
    assert spans[0] == ("system", "Be brief.")
    assert "You help." not in rendered.text
    assert roles_in(tokenizer, record, prompts=True)[0][0] == ("system", "Be brief.")
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "Two.")]
    if "id" not in record and "question" not in record:
        assert rendered.text == roles_in(tokenizer, chat(*turns))[1].text
    twice = {**chat(*turns), "system": "Be long."}
    assert roles_in(tokenizer, twice)[1].unread == {"system"}


def test_earlier_turns_in_a_field_of_their_own_come_first(tokenizer):
    record = {**ALPACA, "history": [["A?", "B."], ["C?", "D."]], "system": "S."}
    turns = [("system", "S."), ("user", "A?"), ("assistant", "B."), ("user", "C?")]
    turns += [("assistant", "D."), ("user", "One?"), ("assistant", "Two.")]
    assert roles_in(tokenizer, record) == roles_in(tokenizer, chat(*turns))
    assert roles_in(tokenizer, record, prompts=True)[0][-1] == ("user", "One?")


# As Qwen writes them: behind the system prompt.
WITH_TOOLS = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% set messages = messages[1:] %}{% else %}You help.{% endif %}"
    "{% if tools %}\n\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}"
)


@pytest.mark.parametrize("tools", [TOOLS, [ADD], json.dumps([ADD])])
@pytest.mark.parametrize("system", ["", "S."])
def test_tools_are_rendered_as_what_the_system_says(tokenizer, tools, system):
    tokenizer.chat_template = WITH_TOOLS
    record = {**CHAT, "tools": tools, "system": system}
    spans, rendered = roles_in(tokenizer, record)
    messages = [{"role": "system", "content": system}] * bool(system) + CHAT["messages"]
    assert rendered.text == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    *by_system, question, answer = spans
    assert {role for role, _ in by_system} == {"system"}
    words = " ".join(text for _, text in by_system).split()
    assert words == f"{system or 'You help.'} # Tools {json.dumps(TOOLS[0])}".split()
    assert (question, answer) == (("user", "One?"), ("answer", "Two."))
    assert (rendered.n_left_out, rendered.n_unknown) == (0, 0)


def test_tools_that_the_template_ignores_are_counted(tokenizer):
    _, rendered = roles_in(tokenizer, {**CHAT, "tools": TOOLS})
    assert (rendered.n_left_out, rendered.n_unknown) == (1, 0)
    assert roles_in(tokenizer, {**CHAT, "tools": "[]"})[1].n_left_out == 0


def test_a_template_for_images_gets_its_text_in_parts(tokenizer):
    whole = tokenizer.chat_template
    expected = roles_in(tokenizer, CHAT)
    parts = "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    tokenizer.chat_template = whole.replace("{{ m['content'] }}", parts)
    assert roles_in(tokenizer, CHAT) == expected


def test_columns_say_where_the_fields_are_and_what_is_not_read_is_named(tokenizer):
    record = {"text": "no", "body": "B.", "q": "One?", "a": "Two.", "empty": ""}
    for columns, spans, unread in (
        (["text=body"], [("text", "B.")], {"text", "q", "a"}),
        (["question=q", "answer=a"],
         [("system", "You help."), ("user", "One?"), ("answer", "Two.")], {"text", "body"}),
    ):  # fmt: skip
        rendered = Renderer(tokenizer, "auto", columns=parse_columns(columns)).render(record)
        found = [(role, rendered.text[start:stop]) for start, stop, role in rendered.spans]
        assert (found, rendered.unread) == (spans, unread)
    assert roles_in(tokenizer, {**CHAT, "id": 3, "images": []})[1].unread == {"id"}


@pytest.mark.parametrize("column", ["body", "txt=body", "text=", "text=a text=b"])
def test_columns_of_another_form_are_one_line(column):
    with pytest.raises(ConfigError, match="expected FIELD=COLUMN"):
        parse_columns(column.split())


def test_chat_messages_keep_the_roles_of_all_turns(tokenizer):
    turns = [("system", "Hi"), ("user", "user"), ("assistant", "Hi"), ("tool", "1"), ("user", "Hi")]
    # Words of headers and parts that occur twice are where they stand, not where they occur first.
    spans, rendered = roles_in(tokenizer, chat(*turns))
    role_of = {"assistant": "answer", "tool": "user"}
    assert spans == [(role_of.get(role, role), content) for role, content in turns]
    places = [match.start() for match in re.finditer(r"(?<=\n)[^<\n]+(?=<\|im_end)", rendered.text)]
    assert [start for start, _, _ in Renderer(tokenizer, "chat").render(chat(*turns)).spans] == (
        places
    )


def test_thinking_inside_an_answer_has_its_own_role(tokenizer):
    for content in ("<think>\nHm.\n</think>\n\nYes.", "Hm.</think> Yes.", "<think>Hm.</think>Yes."):
        spans, rendered = roles_in(tokenizer, chat(("user", "<think>?"), ("assistant", content)))
        assert spans[1:] == [("user", "<think>?"), ("think", "Hm."), ("answer", "Yes.")]
        assert content in rendered.text
    spans, _ = roles_in(tokenizer, chat(("user", "?"), ("assistant", "<think>Hm. So")))
    assert spans[2:] == [("think", "Hm. So")]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_thinking_in_a_field_of_its_own_is_the_think_part_where_the_template_shows_it(
    tokenizer, name
):
    record = chat(("user", "Is it?"), ("assistant", "Yes."))
    record["messages"][1][name] = "Hm.\n"
    _, hidden = roles_in(tokenizer, record)
    assert (hidden.n_left_out, hidden.n_unknown) == (1, 0)
    assert "Hm." not in hidden.text
    tokenizer.chat_template = QWEN3
    spans, shown = roles_in(tokenizer, record)
    assert spans == [("user", "Is it?"), ("think", "Hm."), ("answer", "Yes.")]
    assert "<think>\nHm.\n</think>\n\nYes." in shown.text
    assert (shown.n_left_out, shown.n_unknown) == (0, 0)


def test_earlier_thinking_that_a_template_drops_is_counted_and_nothing_else_moves(tokenizer):
    think = "<think>\nUser\n</think>\n\n"
    turns = [("user", "User"), ("assistant", think + "User"), ("user", "B"), ("assistant", think)]
    tokenizer.chat_template = QWEN3
    spans, rendered = roles_in(tokenizer, chat(*turns))
    assert spans == [("user", "User"), ("answer", "User"), ("user", "B"), ("think", "User")]
    assert rendered.spans[0][0] == rendered.text.index("user\nUser") + len("user\n")
    assert (rendered.n_left_out, rendered.n_unknown) == (1, 0)
    tokenizer.chat_template = R1
    spans, rendered = roles_in(tokenizer, chat(*turns[:2]))
    assert (spans, rendered.n_left_out) == ([("user", "User"), ("answer", "User")], 1)


def test_a_part_that_the_template_rewrites_is_text_and_counted(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", "{{ m['content'] | replace('cat', 'dog') }}"
    )
    record = chat(("system", "S."), ("user", "A cat?"), ("assistant", "A cow."), ("user", "Why?"))
    spans, rendered = roles_in(tokenizer, record)
    assert rendered.n_unknown == 1
    assert [role for role, _ in spans] == ["system", "text", "answer", "user"]
    assert "A dog?" in spans[1][1]
    assert [spans[0], *spans[2:]] == [("system", "S."), ("answer", "A cow."), ("user", "Why?")]


def test_what_a_template_makes_of_tool_calls_is_text_and_counted(tokenizer):
    tokenizer.chat_template = QWEN3.replace("m.content %}", "m.content or '' %}")
    record = chat(("user", "Sum?"), ("assistant", None), ("tool", "3"), ("assistant", "Three."))
    record["messages"][1]["tool_calls"] = [{"type": "function", "function": {"name": "add"}}]
    spans, rendered = roles_in(tokenizer, record)
    assert rendered.n_unknown == 1
    assert [role for role, _ in spans] == ["user", "text", "user", "answer"]
    assert "<tool_call>\nadd\n</tool_call>" in spans[1][1]


@pytest.mark.parametrize(
    ("template", "system", "start"),
    [
        (LLAMA3, ["Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"], "<bos><|st"),
        (GEMMA, [], "<bos><start_of_turn>user\nOne?<end"),
        (MISTRAL, [], "<bos>[INST] One? [/INST]  Two.\u3000<|im_end|>"),
        (VICUNA, ["A chat between two."], "A chat between two.\n\nUSER: One? ASSISTANT:  Tw"),
    ],
)
def test_each_familys_template_has_its_roles(tokenizer, template, system, start):
    tokenizer.chat_template = template
    spans, rendered = roles_in(tokenizer, {"question": "One?", "answer": " Two.\u3000"})
    assert spans == [*(("system", s) for s in system), ("user", "One?"), ("answer", "Two.")]
    assert rendered.text.startswith(start)
    assert not rendered.plain


def test_a_template_that_asks_for_the_date_gives_the_same_text_every_day(tokenizer):
    for code, day in (("%d %b %Y", "26 Jul 2024"), ("%B %-d, %Y", "July 26, 2024")):
        tokenizer.chat_template = "\nOn {{ strftime_now('" + code + "') }}: " + CHAT_TEMPLATE
        assert roles_in(tokenizer, chat(("user", "Hi")))[1].text.startswith(f"\nOn {day}: <|im_")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (R1, "<|Assistant|><think>\n"),
        (LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
        (GEMMA, "<start_of_turn>model\n"),
    ],
)
def test_a_prompt_ends_where_the_assistants_last_turn_begins(tokenizer, template, end):
    tokenizer.chat_template = template
    record = chat(("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D."))
    spans, rendered = roles_in(tokenizer, record, prompts=True)
    assert rendered.text.endswith(end)
    assert [span for span in spans if span[0] != "system"] == [
        ("user", "A?"), ("answer", "B."), ("user", "C?"),
    ]  # fmt: skip


def test_an_s1_prompt_is_the_start_of_the_s1_text(tokenizer):
    record = s1_records(1)[0]
    whole = roles_in(tokenizer, record)[1].text
    prompt = roles_in(tokenizer, record, prompts=True)[1].text
    assert prompt.endswith("<|im_start|>assistant\n<|im_start|>think\n")
    assert whole.startswith(prompt)
    assert roles_in(tokenizer, {"text": whole}, prompts=True)[1].text == prompt


@pytest.mark.parametrize(
    "record", [{"question": "A?"}, {"prompt": "A?"}, {"problem": "A?"}, chat(("user", "A?"))]
)
def test_a_prompt_needs_no_answer(tokenizer, record):
    assert roles_in(tokenizer, record, prompts=True)[0][-1] == ("user", "A?")


def test_a_text_that_is_rendered_already_has_the_roles_of_its_record(tokenizer):
    for template in (CHAT_TEMPLATE, QWEN3, GEMMA):
        tokenizer.chat_template = template
        for record in (s1_records(2)[1], chat(("user", "Hi"), ("assistant", "<think>a</think>b"))):
            spans, rendered = roles_in(tokenizer, record)
            again, parsed = roles_in(tokenizer, {"text": rendered.text})
            again = [span for span in again if span != ("text", "<bos>")]
            assert (again, parsed.text, parsed.plain) == (spans, rendered.text, False)


def test_turn_headers_that_are_no_tokens_of_this_tokenizer_are_plain_text(tokenizer_dir):
    from transformers import AutoTokenizer

    record = {"text": "<start_of_turn>user\nHi<end_of_turn>"}
    spans, rendered = roles_in(AutoTokenizer.from_pretrained(tokenizer_dir), record)
    assert (spans, rendered.plain) == ([("text", record["text"])], True)


def test_sections_follow_headers_and_tags():
    text = "a</think>b</think>c<|im_end|>\n<|im_start|>user\n<think>\n<|im_start|>assistant\n d "
    assert [(role, text[start:stop]) for start, stop, role in role_spans(text, "answer")] == [
        ("think", "a"), ("answer", "b"), ("answer", "c"), ("user", "<think>"), ("answer", "d"),
    ]  # fmt: skip
    assert role_spans("x<|im_end|>y", "answer") == [(0, 1, "answer"), (11, 12, "text")]
    assert role_spans("<|im_start|>users\n", "answer") == [(0, 17, "answer")]


@pytest.mark.parametrize("name", ["text", "content"])
def test_plain_text_is_text_whatever_its_column_is_called(tokenizer, name):
    spans, rendered = roles_in(tokenizer, {name: " Plain é <think> text\x00\n"})
    assert (spans, rendered.plain) == ([("text", " Plain é <think> text\x00\n")], True)


def test_an_empty_part_makes_an_empty_text(tokenizer):
    records = [
        *({**s1_records(1)[0], name: "  "} for name in s1_records(1)[0]),
        {"question": "Hi", "answer": " "}, {"messages": []}, chat(("user", " "), ("assistant", "")),
        {"text": ""}, {"text": " \n\t"},
    ]  # fmt: skip
    for record in records:
        assert roles_in(tokenizer, record)[1].text == ""


def test_fields_that_fit_no_template_are_listed():  # pitfall B19
    with pytest.raises(RecordError, match=r"fields body, title; .*such as --columns text=title"):
        detect_form({"title": "a", "body": "b"})


@pytest.mark.parametrize(
    ("record", "template", "message"),
    [
        ({"text": 3}, "text", "field text is int, expected text"),
        ({"text": None}, "auto", "all its fields are empty"),
        ({"body": "x"}, "text", "field text is missing; it has body; --columns text=COLUMN"),
        ({"question": "x"}, "s1", "lacks the s1 fields .*; it has question"),
        ({**s1_records(1)[0], "question": None}, "s1", "lacks the s1 fields .*; it has deepseek_a"),
        ({"question": "x", "thinking_trajectories": [1], "attempt": "y"}, "s1", "is list"),
        ({"messages": "x"}, "chat", "field messages is str, expected a list of messages"),
        ({"text": "x"}, "chat", "neither messages nor question"),
        ({"question": "x", "answer": 3}, "auto", "field answer is int"),
        ({"messages": ["x"]}, "auto", r"messages\[0\] is str, expected role and content"),
        ({"messages": [{"content": "x"}]}, "auto", r"messages\[0\] has no role; it has content"),
        (chat(("user", None)), "auto", r"messages\[0\]: content is NoneType, expected text"),
        (chat(("user", [{"type": "image"}])), "auto", "a part of type image, expected text"),
        ({"conversations": [{"from": "x", "value": "y"}]}, "auto", "is from 'x', expected human"),
        ({"text": "a\ud800b"}, "auto", "lone surrogate"),
        ({**CHAT, "tools": "[{"}, "auto", "field tools is not JSON"),
        ({**CHAT, "tools": "3"}, "auto", "field tools is int, expected a list of objects"),
        ({**CHAT, "tools": ["add"]}, "auto", "field tools is list, expected a list of objects"),
        ({**ALPACA, "history": "Hi"}, "auto", "field history is str, expected a list of pairs"),
        ({**ALPACA, "history": [["Hi"]]}, "auto", r"history\[0\] is no pair of texts"),
        ({"question": "a\ud800b", "answer": "x"}, "auto", "lone surrogate"),
    ],
)
def test_a_record_that_cannot_be_used_says_why(tokenizer, record, template, message):  # B19
    with pytest.raises(RecordError, match=message) as caught:
        roles_in(tokenizer, record, template)
    assert "\n" not in str(caught.value)


def test_messages_that_a_template_refuses_break_their_record(tokenizer):
    tokenizer.chat_template = GEMMA
    with pytest.raises(RecordError, match="the chat template rejects .*System role not supported"):
        roles_in(tokenizer, chat(("system", "S."), ("user", "Hi")))


def test_a_template_that_shows_nothing_of_the_messages_breaks_their_record(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.image }}\n{% endfor %}"
    with pytest.raises(RecordError, match="omits everything that its messages say"):
        roles_in(tokenizer, chat(("user", "Hi")))


def test_a_tokenizer_without_a_chat_template_is_told_of(tokenizer):  # pitfall B15
    tokenizer.chat_template = None
    with pytest.raises(DatasetError, match=r"no chat template.*--columns text=COLUMN") as caught:
        roles_in(tokenizer, s1_records(1)[0], "s1")
    assert not isinstance(caught.value, RecordError)
    assert roles_in(tokenizer, {"text": "a b"})[0] == [("text", "a b")]
    for record in (CHAT, ALPACA, s1_records(1)[0]):  # messages, and the same as a text
        assert roles_in(tokenizer, {**record, "text": "a b"})[0] == [("text", "a b")]
