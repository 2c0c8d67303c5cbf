"""Questions to a language model's server: retries, fallbacks, the cache, and hostile servers."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders.chat_server import Reply, chat_server

from lorascope.demo.demo import SUBJECT
from lorascope.errors import ConfigError, ServerError
from lorascope.labels.chat import Chat, Question

pytestmark = pytest.mark.needs("openai")

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


def question(text: str) -> Question:
    return Question("Answer with JSON.", text, SCHEMA, 20)


def read(answer: Any) -> int:
    if not isinstance(answer, dict) or not isinstance(answer.get("n"), int):
        raise ValueError("n is expected as a whole number")
    return answer["n"]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def chat(url: str, cache: Path, **options: Any) -> Chat:
    return Chat(url, "tiny", cache, **{"timeout": 5.0, "n_parallel": 1, **options})


def test_answers_come_in_the_order_of_the_questions(cache: Path) -> None:
    with chat_server(lambda body, _: body["messages"][1]["content"]) as server:
        asked = [question(f'{{"n": {i}}}') for i in range(20)]
        client = chat(server.url, cache, n_parallel=8)
        assert client.ask(asked, read, "test") == list(range(20))
    assert client.usage["requests"] == 20
    assert (client.usage["tokens read"], client.usage["tokens written"]) == (2000, 140)


def test_the_schema_goes_along(cache: Path) -> None:
    with chat_server(lambda *_: '{"n": 1}') as server:
        chat(server.url, cache).ask([question("?")], read, "test")
    assert server.requests[0]["response_format"]["json_schema"]["schema"] == SCHEMA
    assert server.requests[0]["temperature"] == 0


def test_a_repeated_run_asks_nothing(cache: Path) -> None:
    with chat_server(lambda *_: '{"n": 1}') as server:
        assert chat(server.url, cache).ask([question("?")], read, "test") == [1]
        again = chat(server.url, cache)
        assert again.is_answered(question("?"))
        assert again.ask([question("?")], read, "test") == [1]
        assert again.usage["cached"] == 1
        assert len(server.requests) == 1
        other = Chat(server.url, "other", cache)
        other.ask([question("?")], read, "test")
        assert len(server.requests) == 2, "another model is asked itself"


def test_a_killed_run_continues_without_asking_twice(cache: Path) -> None:
    asked = [question(str(i)) for i in range(6)]

    def fail_at_the_fourth(_: Any, number: int) -> Reply | str:
        return Reply("no credit", 402) if number == 3 else '{"n": 1}'

    with chat_server(fail_at_the_fourth) as server:
        with pytest.raises(ServerError, match="no credit"):
            chat(server.url, cache).ask(asked, read, "test")
        with cache.open("ab") as file:
            file.write(b'{"question": "torn')
        assert chat(server.url, cache).ask(asked, read, "test") == [1] * 6
        assert len(server.requests) == 7, "the refused one again, no other"
        assert chat(server.url, cache).ask(asked, read, "test") == [1] * 6
        assert len(server.requests) == 7


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(cache: Path, status: int) -> None:
    def busy_at_first(_: Any, number: int) -> Reply | str:
        return Reply("busy", status, {"Retry-After": "0"}) if number == 0 else '{"n": 1}'

    with chat_server(busy_at_first) as server:
        assert chat(server.url, cache).ask([question("?")], read, "test") == [1]
        assert len(server.requests) == 2


def test_a_late_answer_is_asked_for_again(cache: Path) -> None:
    def late_at_first(_: Any, number: int) -> Reply | str:
        return Reply('{"n": 1}', seconds=1.0 if number == 0 else 0.0)

    with chat_server(late_at_first) as server:
        client = chat(server.url, cache, timeout=0.3)
        assert client.ask([question("?")], read, "test") == [1]


@pytest.mark.parametrize(
    "text",
    [
        'Of course! Here it is:\n```json\n{"n": 1}\n```\nAnything else?',
        '<think>Is it {"n": 2}? No.</think>{"n": 1}',
        'First {not json}, then {"n": 1}',
    ],
)
def test_json_is_found_in_prose(cache: Path, text: str) -> None:
    with chat_server(lambda *_: text) as server:
        assert chat(server.url, cache).ask([question("?")], read, "test") == [1]


@pytest.mark.parametrize("bad", ['{"n": 1', '{"n": "one"}', "I cannot do that.", "", "[" * 9999])
def test_an_invalid_answer_is_asked_for_once_more(cache: Path, bad: str) -> None:
    with chat_server(lambda _, number: bad if number == 0 else '{"n": 1}') as server:
        assert chat(server.url, cache).ask([question("?")], read, "test") == [1]
        assert "Not valid" in server.requests[1]["messages"][-1]["content"]
        assert server.requests[1]["max_tokens"] == 2 * server.requests[0]["max_tokens"]


def test_two_invalid_answers_are_no_answer_and_others_go_on(cache: Path) -> None:
    def never_for_a(body: Any, _: int) -> str:
        return "no" if body["messages"][1]["content"] == "a" else '{"n": 1}'

    with chat_server(never_for_a) as server:
        client = chat(server.url, cache)
        assert client.ask([question("a"), question("b")], read, "test") == [None, 1]
        assert client.usage["without answer"] == 1
        assert chat(server.url, cache).ask([question("a")], read, "test") == [None]
        assert len(server.requests) == 3, "that there is no answer is remembered too"


def test_a_server_that_refuses_or_ignores_schemas_is_shown_an_example(cache: Path) -> None:
    asked = [question(text)._replace(example=("0?", '{"n": 0}')) for text in "abc"]

    def roles(body: Any) -> list[str]:
        return [message["role"] for message in body["messages"]]

    def plain(body: Any, _: int) -> Reply | str:
        return Reply("no response_format", 400) if "response_format" in body else '{"n": 1}'

    def ignores(body: Any, _: int) -> str:
        return '{"n": 1}' if "assistant" in roles(body) else "The answer is one."

    for number, answer in enumerate((plain, ignores)):
        with chat_server(answer) as server:
            path = cache.with_name(f"{number}.jsonl")
            assert chat(server.url, path).ask(asked, read, "test") == [1, 1, 1]
            assert len(server.requests) == 4, "the others are asked with the example at once"
            for body in server.requests[-2:]:
                assert [m["content"] for m in body["messages"][1:3]] == ["0?", '{"n": 0}']
    with chat_server(lambda *_: '{"n": 1}') as server:
        chat(server.url, cache).ask(asked, read, "test")
        assert all(roles(body) == ["system", "user"] for body in server.requests)


def test_of_a_list_that_is_cut_off_the_whole_values_count(cache: Path) -> None:
    def read_list(answer: Any) -> Any:
        return answer["n"]

    with chat_server(lambda *_: '{"n": [true, false, tr') as server:
        assert chat(server.url, cache).ask([question("?")], read_list, "test") == [[True, False]]


@pytest.mark.parametrize("status", [301, 401, 404])
def test_a_refusal_ends_in_one_line(cache: Path, status: int) -> None:
    with chat_server(lambda *_: '{"n": 1}') as elsewhere:
        refusal = Reply("no\n\x1b[2J", status, {"Location": elsewhere.url + "/chat/completions"})
        with chat_server(lambda *_: refusal) as server, pytest.raises(ServerError) as caught:
            chat(server.url, cache).ask([question("?")], read, "test")
        assert elsewhere.requests == [], "nothing is sent to a URL that the user did not name"
    message = str(caught.value)
    assert server.url in message
    assert message.isprintable()


def test_a_server_that_is_not_there_ends_in_one_line(cache: Path) -> None:
    with pytest.raises(ServerError, match="does not answer"):
        chat("http://127.0.0.1:9/v1", cache, max_retries=0).ask([question("?")], read, "test")
    with pytest.raises((ServerError, ConfigError)):
        chat("nowhere", cache, max_retries=0).ask([question("?")], read, "test")


def test_an_error_does_not_wait_for_answers_that_are_due(cache: Path) -> None:
    gate = threading.Event()

    def refuse_one(body: Any, _: int) -> Reply:
        if body["messages"][1]["content"] == "refused":
            return Reply("no", 403)
        gate.wait(20)
        return Reply('{"n": 1}')

    with chat_server(refuse_one) as server:
        asked = [question("slow"), question("refused")]
        with pytest.raises(ServerError):
            chat(server.url, cache, n_parallel=2, timeout=30.0).ask(asked, read, "test")
        assert not gate.is_set()
        gate.set()


@pytest.fixture
def transformers_serve(tmp_path: Path) -> Iterator[str]:
    """The address of `transformers serve`, which loads the model that a request names."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    words = [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "serve.log").open("wb") as log:
        server = subprocess.Popen(
            words, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (tmp_path / "serve.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


@pytest.mark.slow
@pytest.mark.needs("fastapi")
@pytest.mark.needs("uvicorn")
def test_a_real_server_answers(transformers_serve: str, cache: Path) -> None:
    """The demo's base model writes no JSON, which is no answer, and no error."""
    client = Chat(transformers_serve, str(SUBJECT / "base"), cache, n_parallel=1, timeout=300.0)
    assert client.ask([question("How many?")], read, "test") == [None]
    assert client.usage["requests"] == 2
    assert client.usage["tokens read"] > 10 and client.usage["tokens written"] > 0
    again = Chat("http://127.0.0.1:9/v1", client.model, cache)
    assert again.ask([question("How many?")], read, "test") == [None], "from the cache"
