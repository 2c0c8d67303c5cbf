"""Generate word problems with reasoning traces, and label the characters of known token classes.

1. `make_problem(split, index)` seeds its own generator with both, so the same arguments always give
   the same problem. It draws questions until one belongs to the split.
2. The hash of a question decides its split (`split_of`). Splits therefore never share a question,
   and no list of used questions is needed.
3. `stories` draws what happens: sentences, and steps that depend on each other.
4. `_trace` writes the steps as reasoning: plan, compute, sometimes make a mistake and notice it,
   check, conclude. `_attempt` writes the short solution.
5. Numbers that an earlier step computed are marked while the text is written. `_finish` removes the
   marks and records their positions, with the other token classes, in `Problem.spans`.
"""

import json
import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from lorascope.demo.stories import INVERSE, NAMES, RARE_NAMES, VERBS, Step, Story, draw_story

Span = tuple[int, int]
Spans = dict[str, tuple[Span, ...]]

SPLITS = {"train": range(80), "eval": range(80, 90), "demo": range(90, 100)}
FIELDS = ("question", "deepseek_thinking_trajectory", "deepseek_attempt")
CLASSES = ("operator", "digit", "carried", "check", "answer_marker", "name")

_CLASS_PATTERNS = {
    "operator": re.compile(r"[+−×÷=]"),
    "digit": re.compile(r"[0-9]"),
    "check": re.compile(r"\b(?:[Ww]ait|(?:[Dd]ouble-)?[Cc]heck(?:ing)?|[Vv]erify)\b"),
    "answer_marker": re.compile(r"\b(?:Final answer|[Aa]nswer|Therefore|Thus|Hence)\b:?"),
    "name": re.compile("|".join((*NAMES, *RARE_NAMES))),
}
_CARRIED = re.compile(r"⟦(\d+)⟧")
_ANSWER = re.compile(r"answer(?:\s+is)?[\s:*→=]*(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """A problem in the s1 format, its answer, and the character spans of its token classes.

    `spans[field][class]` holds sorted, disjoint (start, end) character spans in that field's text.
    `carried` marks the reuse of a number that an earlier step computed.
    """

    split: str
    index: int
    kind: str
    question: str
    deepseek_thinking_trajectory: str
    deepseek_attempt: str
    solution: str
    answer: str
    spans: dict[str, Spans]

    def record(self) -> dict[str, str]:
        """Return the record that `write_jsonl` writes: texts only, no spans."""
        return {
            "id": f"{self.split}-{self.index}",
            "kind": self.kind,
            **{name: getattr(self, name) for name in (*FIELDS, "solution", "answer")},
        }


def make_problem(split: str, index: int) -> Problem:
    """Return problem `index` of `split`, the same on every machine and Python version."""
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: expected one of {', '.join(SPLITS)}")
    rng = random.Random(f"lorascope/problems/{split}/{index}")
    while True:
        kind, story = draw_story(rng)
        question, ignore = _question(rng, story)
        if split_of(question) == split:
            break
    answer = str(story.steps[-1].result)
    marked = (question, _trace(rng, story, ignore), _attempt(rng, story))
    finished = [_finish(text) for text in marked]
    return Problem(
        split=split,
        index=index,
        kind=kind,
        question=finished[0][0],
        deepseek_thinking_trajectory=finished[1][0],
        deepseek_attempt=finished[2][0],
        solution=_finish(_equations(story.steps, "; "))[0],
        answer=answer,
        spans={name: spans for name, (_, spans) in zip(FIELDS, finished, strict=True)},
    )


def split_of(question: str) -> str:
    """Return the split that a question belongs to."""
    bucket = zlib.crc32(question.encode()) % 100
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def write_jsonl(path: Path | str, n: int, split: str, start: int = 0) -> None:
    """Write problems `start` to `start + n - 1` of `split` as UTF-8, one JSON object per line."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for index in range(start, start + n):
            record = make_problem(split, index).record()
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def answer_of(text: str) -> str | None:
    """Return the number after the last answer marker of `text`, or None if there is none."""
    answers = _ANSWER.findall(text)
    return str(int(answers[-1])) if answers else None


def token_classes(text: str) -> Spans:
    """Return the spans of every class that the text alone decides: all but `carried`."""
    return {
        name: tuple(match.span() for match in pattern.finditer(text))
        for name, pattern in _CLASS_PATTERNS.items()
    }


def _finish(marked: str) -> tuple[str, Spans]:
    """Remove the marks; return the text and the spans of all its classes."""
    text, last = "", 0
    carried: list[Span] = []
    for match in _CARRIED.finditer(marked):
        text += marked[last : match.start()]
        carried.append((len(text), len(text) + len(match[1])))
        text += match[1]
        last = match.end()
    text += marked[last:]
    return text, {**token_classes(text), "carried": tuple(carried)}


def _show(operand: int | Step) -> str:
    """Return the number as text, marked if an earlier step computed it."""
    return str(operand) if isinstance(operand, int) else f"⟦{operand.result}⟧"


def _side(step: Step) -> str:
    return f"{_show(step.left)} {step.op} {_show(step.right)}"


def _equations(steps: list[Step], joint: str) -> str:
    return joint.join(f"{_side(step)} = {step.result}" for step in steps)


def _question(rng: random.Random, story: Story) -> tuple[str, str]:
    """Return the question, and the sentence that dismisses its distractor ("" if it has none)."""
    if not story.bystander or rng.random() < 0.55:
        return " ".join((*story.sentences, story.ask)), ""
    who, k = story.bystander, rng.randint(2, 60)
    forms = (
        (f"{who} is {k} years old.", f"The age of {who} does not matter."),
        (f"It is {k} degrees outside.", f"The {k} degrees do not matter."),
        (f"The shop is {k} minutes away.", f"We can ignore the {k} minutes."),
        (f"{who} has a dog and {k} toys.", f"The toys of {who} do not matter."),
    )
    sentence, ignore = rng.choice(forms)
    sentences = list(story.sentences)
    sentences.insert(rng.choice((0, len(sentences))), sentence)
    return " ".join((*sentences, story.ask)), ignore


def _trace(rng: random.Random, story: Story, ignore: str) -> str:
    """Return the reasoning as marked text: plan, steps, mistakes, checks, conclusion."""
    steps, answer = story.steps, story.steps[-1].result
    verbs = [VERBS[step.op] for step in steps]
    openers = (
        "Okay, let me think.",
        "Let us go step by step.",
        "Hmm, let me read that again.",
        f"We have {len(steps)} steps here.",
        "First I need a plan.",
    )
    plans = (
        f"Plan: {', '.join(verbs)}.",
        f"I will {', then '.join(verbs)}.",
        f"Plan: {' → '.join(verbs)}.",
    )
    lines = [rng.choice(openers), rng.choice(plans), *([ignore] if ignore else [])]
    slip_at = rng.choice([*range(len(steps))]) if rng.random() < 0.25 else -1
    check_at = rng.choice([*range(len(steps))]) if rng.random() < 0.6 else -1
    order = rng.choice((("First", "Then", "Next", "Now"), ("First", "Next", "Then", "After that")))
    style = rng.choice(("order", "label", "verb", "arrow"))
    for i, step in enumerate(steps):
        label = step.label if len(step.label) == 1 else step.label[0].upper() + step.label[1:]
        lead = {
            "order": f"{order[i]}, ",
            "label": f"{label}: ",
            "verb": f"{order[i]} I {VERBS[step.op]}: ",
            "arrow": "→ ",
        }[style]
        unit = f" {story.unit}" if story.unit and rng.random() < 0.4 else ""
        slip = _slip(rng, step) if i == slip_at else ""
        lines.append(f"{lead}{slip}{_side(step)} = {step.result}{unit}.")
        if i == check_at:
            # The check reverses the step, so it uses the result again.
            again = f"⟦{step.result}⟧ {INVERSE[step.op]} {_show(step.right)} = {_show(step.left)}"
            checks = (
                f"Check: {again} ✓",
                f"Let me check: {again}. Good.",
                f"To verify, {again} ✓",
                f"Wait, is that right? {again} ✓",
            )
            lines.append(rng.choice(checks))
    conclusions = (
        f"So the answer is {answer}.",
        f"Therefore the answer is {answer}.",
        f"Thus {answer} {story.unit}".rstrip() + ".",
        f"Hence the result is {answer}. ✓",
        f"Therefore: {story.conclusion.format(answer)}.",
    )
    lines.append(rng.choice(conclusions))
    return rng.choice((" ", "\n")).join(lines)


def _slip(rng: random.Random, step: Step) -> str:
    """Return a wrong attempt at the step, and the words that notice it."""
    if rng.random() < 0.5:
        wrong = max(1, step.result + rng.choice((-10, -2, -1, 1, 2, 10)))
        wrong += wrong == step.result
        words = ("Wait, that is wrong.", "Wait, let me check.", "Hmm, wait. Not right.")
        return f"{_side(step)} = {wrong}. {rng.choice(words)} "
    other, verb = rng.choice([op for op in VERBS if op != step.op]), VERBS[step.op]
    words = (f"Wait, I must {verb}.", f"No, wait, {verb} here.")
    return f"{_show(step.left)} {other} {_show(step.right)}. {rng.choice(words)} "


def _attempt(rng: random.Random, story: Story) -> str:
    """Return the short solution as marked text. It ends with the answer marker and the answer."""
    answer = story.steps[-1].result
    body = rng.choice((_equations(story.steps, ", "), story.conclusion.format(answer)))
    marker = rng.choice((" Answer: ", "\nFinal answer: "))
    return f"{body}.{marker}{answer}"
