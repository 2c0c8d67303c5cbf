"""Ask a language model for JSON answers, over any server with the OpenAI protocol.

1. A question is a system message, a user message and a JSON schema of the answer. Its digest, with
   the model's name, is the key of the cache.
2. Answers that the cache has are not asked again. The others go to the server from several threads.
   The `openai` client waits and tries again after time-outs, 429 and 5xx.
3. The schema goes along as `response_format`. Servers that refuse it, or answer without any JSON,
   get questions after an example with its answer from then on. The first JSON object of the text
   counts. `<think>` segments are dropped. Of a list that is cut off, the whole values count.
4. An answer that is cut off or does not have the schema is asked for once more, with the example
   and the reason. After that the question has no answer.
5. Each answer is appended to the cache at once. A run that was killed continues from there, and a
   repeated run asks nothing.

Nothing is sent anywhere but to the URL that the user named: redirects are not followed.
"""

import json
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from lorascope import runtime
from lorascope.artifact import digest_of
from lorascope.errors import ConfigError, ServerError

if TYPE_CHECKING:
    import openai
    from openai.types.chat import ChatCompletionMessageParam

log = logging.getLogger(__name__)

_CHARACTERS_PER_TOKEN = 3.5  # of English text with punctuation, for estimates only
_THINK = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_MOST_SHOWN = 200  # characters of a server's message, or of a wrong answer


class Question(NamedTuple):
    """What a model is asked. `schema` describes the JSON object of the answer.

    `example` is another user message and its answer, for servers that take no schema.
    """

    system: str
    user: str
    schema: dict[str, Any]
    max_tokens: int
    example: tuple[str, str] | None = None

    def messages(self, *, with_example: bool = False) -> list[dict[str, str]]:
        """Return the messages in the form of the protocol."""
        shown = self.example if with_example and self.example else ()
        return [
            {"role": "system", "content": self.system},
            *(
                {"role": role, "content": text}
                for role, text in zip(("user", "assistant"), shown, strict=False)
            ),
            {"role": "user", "content": self.user},
        ]

    def n_tokens(self) -> int:
        """Return an estimate of the prompt's tokens."""
        return int(len(self.system + self.user) / _CHARACTERS_PER_TOKEN)


Reader = Callable[[Any], Any]  # from an answer's JSON to a value; ValueError: not the schema


@dataclass
class Chat:
    """A model on a server. `cache` is a file of JSON lines, made if it is absent."""

    base_url: str
    model: str
    cache: Path
    n_parallel: int = 8
    timeout: float = 600.0  # for an answer; a slow server works on in vain if nobody waits
    max_retries: int = 6
    usage: Counter[str] = field(default_factory=Counter)  # what this object asked so far
    _answers: dict[str, str] = field(default_factory=dict, repr=False)
    _is_plain: bool = False  # the server refuses `response_format`
    _shows_form: bool = False  # or does not keep to it
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        """Read the cache. A line that a kill left torn is skipped."""
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        if self.cache.exists():
            for line in self.cache.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    self._answers[entry["question"]] = str(entry["answer"])
                except (ValueError, TypeError, KeyError):
                    continue

    def describe_usage(self) -> str:
        """Return what this object asked so far, as a line to read. Cached answers cost nothing."""
        n = self.usage
        return (
            f"{self.model}: {n['requests']:,} requests, {n['cached']:,} answers from the cache, "
            f"{n['without answer']:,} questions without a valid answer; {n['tokens read']:,} "
            f"tokens read, {n['tokens written']:,} written"
        )

    def _count(self, what: str, n: int = 1) -> None:
        with self._lock:
            self.usage[what] += n

    def is_answered(self, question: Question) -> bool:
        """Return whether the cache answers a question."""
        return self._digest(question) in self._answers

    def ask(self, questions: Sequence[Question], read: Reader, label: str) -> list[Any]:
        """Return for each question what `read` makes of its answer, or None without a valid one.

        Raises ServerError if the server cannot be reached or refuses. Answers so far are kept.
        """
        client = self._client()
        left = iter(range(len(questions)))  # a C iterator: `next` is safe from several threads
        stopped = threading.Event()
        done: SimpleQueue[tuple[int, Any, Exception | None]] = SimpleQueue()

        def work() -> None:
            while not stopped.is_set() and (index := next(left, None)) is not None:
                try:
                    done.put((index, self._ask(client, questions[index], read), None))
                except Exception as error:  # raised again by the caller's thread
                    stopped.set()
                    done.put((index, None, error))

        # Daemons: an interrupted command does not wait for the answers that are still due.
        for _ in range(min(self.n_parallel, len(questions))):
            threading.Thread(target=work, daemon=True).start()
        answers: list[Any] = [None] * len(questions)
        try:
            with runtime.progress(len(questions), label, "questions") as bar:
                for _ in questions:
                    index, answers[index], error = done.get()
                    if error is not None:
                        raise error
                    bar.update(1)
        finally:
            stopped.set()
            client.close()
        return answers

    def _client(self) -> "openai.OpenAI":
        try:
            import openai
        except ImportError as error:
            raise ConfigError(
                "labels by a language model need the openai package; pip install 'lorascope[label]'"
            ) from error
        try:
            return openai.OpenAI(
                base_url=self.base_url,
                api_key=os.environ.get("OPENAI_API_KEY") or "none",
                timeout=self.timeout,
                max_retries=self.max_retries,
                http_client=openai.DefaultHttpxClient(follow_redirects=False),
            )
        except Exception as error:  # the address is the user's, and each HTTP library words this
            raise ConfigError(
                f"--llm-base-url is {self.base_url!a}, expected an address such as "
                f"http://localhost:8000/v1 ({error})"
            ) from error

    def _ask(self, client: "openai.OpenAI", question: Question, read: Reader) -> Any:
        fault, again = "", list[dict[str, str]]()
        for attempt in range(2):
            digest = self._digest(question, attempt)
            text = self._answers.get(digest)
            if text is not None:
                self._count("cached")
            else:
                text = self._request(client, question, again)
                self._keep(digest, text)
            try:
                return read(_json_object(text))
            except ValueError as error:
                fault = str(error)
            if "{" not in _THINK.sub("", text) and not self._shows_form:
                log.info("%s does not keep to JSON schemas; giving examples", self.base_url)
                self._shows_form = True
            again = [
                {"role": "assistant", "content": text[:_MOST_SHOWN]},
                {"role": "user", "content": f"Not valid: {fault}. Answer with the JSON alone."},
            ]
        self._count("without answer")
        log.debug("%s gave no valid answer (%s)", self.model, fault)
        return None

    def _request(
        self, client: "openai.OpenAI", question: Question, again: Sequence[dict[str, str]]
    ) -> str:
        """Return the answer to a question; `again` follows it at the second attempt."""
        import openai

        form = {"name": "answer", "schema": question.schema}
        while True:
            is_plain = self._is_plain
            options: dict[str, Any] = {}
            if not is_plain:
                options = {"response_format": {"type": "json_schema", "json_schema": form}}
            shows_form = is_plain or self._shows_form or bool(again)
            messages = [*question.messages(with_example=shows_form), *again]
            try:
                reply = client.chat.completions.create(
                    model=self.model,
                    messages=cast("list[ChatCompletionMessageParam]", messages),
                    max_tokens=question.max_tokens * (2 if again else 1),
                    temperature=0,
                    **options,
                )
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if is_plain:
                    raise self._refused(error) from error
                log.info("%s takes no JSON schema; asking without", self.base_url)
                self._is_plain = True
            except openai.APIError as error:
                raise self._refused(error) from error
        self._count("requests")
        if reply.usage is not None:
            self._count("tokens read", reply.usage.prompt_tokens or 0)
            self._count("tokens written", reply.usage.completion_tokens or 0)
        return (reply.choices[0].message.content or "") if reply.choices else ""

    def _refused(self, error: "openai.APIError") -> ServerError:
        said = " ".join(str(error).split())[:_MOST_SHOWN]
        return ServerError(
            f"{self.base_url} does not answer as {self.model} ({type(error).__name__}: {said!a}); "
            f"{len(self._answers)} answers are kept in {self.cache}; run the command again to "
            "continue"
        )

    def _digest(self, question: Question, attempt: int = 0) -> str:
        return digest_of([self.model, *question[:4], attempt])  # without the example

    def _keep(self, digest: str, text: str) -> None:
        line = json.dumps({"question": digest, "answer": text}).encode() + b"\n"
        with self._lock:
            self._answers[digest] = text
            with self.cache.open("ab") as file:
                file.write(b"\n" + line)  # the first ends what a kill may have left torn


def _json_object(text: str) -> Any:
    """Return the first JSON object in a text. Raises ValueError if there is none.

    A list that is cut off ends after its last whole value.
    """
    text = _THINK.sub("", text)
    decoder = json.JSONDecoder()
    first = at = text.find("{")
    while at >= 0:
        try:
            return decoder.raw_decode(text, at)[0]
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
    with suppress(ValueError, RecursionError):
        return json.loads(text[first:].rpartition(",")[0] + "]}")
    raise ValueError("it has no complete JSON object")
