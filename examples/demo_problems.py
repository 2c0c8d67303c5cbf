"""Generate the demo's word problems with reasoning traces, and label characters of known classes.

The shipped model was trained on such problems (`train_demo_subject.py`), and the package ships the
first 2,000 of the split `demo`.

1. `make_problem(split, index)` seeds its own generator with both, so the same arguments always give
   the same problem. It draws questions until one belongs to the split.
2. The hash of a question decides its split (`split_of`). Splits therefore never share a question,
   and no list of used questions is needed.
3. `draw_story` draws what happens: sentences, and steps that depend on each other. Each *kind*
   (`_inventory`, `_money`, …) has small numbers, so a small model can do each step, but rarely all
   of them at once.
4. `_trace` writes the steps as reasoning: plan, compute, sometimes make a mistake and notice it,
   check, conclude. `_attempt` writes the short solution.
5. Numbers that an earlier step computed are marked while the text is written. `_finish` removes the
   marks and records their positions, with the other token classes, in `Problem.spans`.
"""

import json
import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ivy", "Mia", "Noah"),
    *("Zoë", "José", "Søren", "Chloé", "Jürgen", "Łukasz"),
)
# Too rare for the tokenizer to merge: their letters are split over several byte tokens.
RARE_NAMES = ("Ngọc", "Şükrü", "Đorđe", "Þóra")
THEMES = (
    *(("boxes", "apples"), ("bags", "marbles"), ("packs", "stickers"), ("shelves", "books")),
    *(("rows", "trees"), ("trays", "eggs"), ("baskets", "pears"), ("jars", "beads")),
    *(("boxes", "pens"), ("packs", "cards"), ("bags", "nuts"), ("jars", "coins")),
)
GOODS = ("apples", "pears", "pens", "books", "cards", "eggs", "cups", "balls", "cakes", "hats")
VERBS = {"+": "add", "−": "subtract", "×": "multiply", "÷": "divide"}
INVERSE = {"+": "−", "−": "+", "×": "÷", "÷": "×"}


@dataclass(frozen=True)
class Step:
    """One computation. An operand that is a step stands for that step's result."""

    left: "int | Step"
    op: str
    right: "int | Step"
    label: str

    @property
    def result(self) -> int:
        """Result of the computation."""
        left, right = value_of(self.left), value_of(self.right)
        if self.op == "÷":
            return left // right
        return {"+": left + right, "−": left - right, "×": left * right}[self.op]

    @property
    def is_fair(self) -> bool:
        """Whether division is exact and the numbers stay in the range that the problems use."""
        exact = self.op != "÷" or value_of(self.left) % value_of(self.right) == 0
        return exact and value_of(self.left) > 0 and 2 <= self.result <= 99


@dataclass(frozen=True)
class Story:
    """What happens and what is asked. The result of the last step is the answer."""

    sentences: list[str]
    ask: str
    steps: list[Step]
    unit: str
    conclusion: str  # with {} for the answer
    bystander: str  # a person that a distractor may mention


def draw_story(rng: random.Random) -> tuple[str, Story]:
    """Return the name of a kind and a story of that kind; every step is fair."""
    while True:
        kind = rng.choice(KINDS)
        story = _KINDS[kind](rng)
        if all(step.is_fair for step in story.steps):
            return kind, story


def value_of(operand: int | Step) -> int:
    """Return the number behind an operand."""
    return operand if isinstance(operand, int) else operand.result


# The kinds. Their steps may be unfair; `draw_story` then draws again.


def _people(rng: random.Random, n: int) -> list[str]:
    names = rng.sample(NAMES, n)
    if rng.random() < 0.03:
        names[0] = rng.choice(RARE_NAMES)
    return names


def _inventory(rng: random.Random) -> Story:
    """Draw a heap of things that grows and shrinks in two to four steps."""
    n, m = _people(rng, 2)
    holders, things = rng.choice(THEMES)
    n_steps = rng.choice((2, 3, 3, 4, 4))
    steps: list[Step] = []
    if rng.random() < 0.6:
        a, b = rng.randint(2, 9), rng.randint(2, 6)
        now: int | Step = Step(a, "×", b, f"{things} in the {holders}")
        steps.append(now)
        forms = (
            f"{n} has {a} {holders} with {b} {things} in each.",
            f"{n} fills {a} {holders} and puts {b} {things} into every one.",
            f"There are {b} {things} in each of the {a} {holders} of {n}.",
        )
    else:
        now = rng.randint(4, 40)
        forms = (f"{n} has {now} {things}.", f"{n} starts the day with {now} {things}.")
    sentences = [rng.choice(forms)]
    while len(steps) < n_steps:
        value = value_of(now)
        divisors = [d for d in (2, 3, 4, 5, 6) if value % d == 0 and value // d >= 2]
        ops = ["+", "−"] + ["÷"] * bool(divisors) * 2 + ["×"] * (value <= 12) * 2
        op = rng.choice([op for op in ops if not steps or op != steps[-1].op])
        if op == "+":
            c, label = rng.randint(2, 20), "with the new ones"
            forms = (
                f"Then {n} finds {c} more.",
                f"{m} gives {n} {c} more {things}.",
                f"{n} buys {c} more {things}.",
            )
        elif op == "−":
            c, label = rng.randint(2, max(2, min(20, value - 2))), "what is left"
            forms = (
                f"{n} gives {c} {things} to {m}.",
                f"Then {c} of the {things} get lost.",
                f"{n} sells {c} of them.",
            )
        elif op == "×":
            c, label = rng.randint(2, 5), "the bigger heap"
            forms = (
                f"Then {n} gets {c} times as many.",
                f"A week later there are {c} times as many {things}.",
            )
        else:
            c, label = rng.choice(divisors), "one share"
            forms = (
                f"{n} shares them equally among {c} friends and looks at one share.",
                f"{n} makes {c} equal piles and keeps one pile.",
            )
        now = Step(now, op, c, label)
        steps.append(now)
        sentences.append(rng.choice(forms))
    ask = (f"How many {things} are there now?", f"What number of {things} is that in the end?")
    return Story(sentences, rng.choice(ask), steps, things, f"There are {{}} {things}", m)


def _money(rng: random.Random) -> Story:
    """Draw two purchases, their sum, and often the change."""
    n, m = _people(rng, 2)
    first, second = rng.sample(GOODS, 2)
    a, p, b, q = rng.randint(2, 8), rng.randint(2, 6), rng.randint(2, 8), rng.randint(2, 6)
    one, two = Step(a, "×", p, f"the {first}"), Step(b, "×", q, f"the {second}")
    both = Step(one, "+", two, "together")
    forms = (
        (f"{n} buys {a} {first} at {p} € each and {b} {second} at {q} € each.",),
        (f"{n} takes {a} {first} for {p} € each.", f"{n} also takes {b} {second} for {q} € each."),
    )
    sentences = list(rng.choice(forms))
    if rng.random() < 0.4:
        ask = rng.choice((f"How many € does {n} pay?", "What is the price of it all in €?"))
        return Story(sentences, ask, [one, two, both], "€", f"{n} pays {{}} €", m)
    paid = min(99, both.result + rng.randint(2, 20))
    rest = Step(paid, "−", both, "the rest")
    before, ask = rng.choice(
        (
            (f"{n} had {paid} € before.", f"How many € does {n} have left?"),
            (f"{n} gives the seller {paid} €.", f"How many € does {n} get back?"),
        )
    )
    steps = [one, two, both, rest]
    return Story([*sentences, before], ask, steps, "€", f"{n} keeps {{}} €", m)


def _compare(rng: random.Random) -> Story:
    """Draw three people, each described relative to the previous one, and often a total."""
    n, m, p = _people(rng, 3)
    things, op = rng.choice(GOODS), rng.choice("+−")
    a, b, c = rng.randint(3, 12), rng.randint(2, 5), rng.randint(2, 15)
    second = Step(a, "×", b, m)
    third = Step(second, op, c, p)
    sentences = [
        rng.choice((f"{n} has {a} {things}.", f"{n} owns {a} {things}.")),
        rng.choice((f"{m} has {b} times as many as {n}.", f"{m} has {b} times that number.")),
        f"{p} has {c} {'more' if op == '+' else 'fewer'} than {m}.",
    ]
    if rng.random() < 0.25:
        ask = f"How many {things} does {p} have?"
        return Story(sentences, ask, [second, third], things, f"{p} has {{}} {things}", m)
    steps = [second, third, Step(second, "+", third, "together")]
    ask = f"How many {things} do {m} and {p} have together?"
    return Story(sentences, ask, steps, things, f"{m} and {p} have {{}} {things}", n)


def _equation(rng: random.Random) -> Story:
    """Draw a linear equation in x, and often a further computation with x."""
    m, x, b = rng.randint(2, 6), rng.randint(2, 12), rng.randint(2, 20)
    k, j = rng.randint(2, 5), rng.randint(2, 15)
    n, sign = _people(rng, 1)[0], rng.choice("+−")
    c = m * x + b if sign == "+" else m * x - b
    product = Step(c, INVERSE[sign], b, "the product")
    unknown = Step(product, "÷", m, "x")
    steps = [product, unknown]
    told = rng.random() < 0.5
    if told:
        does = f"multiplies it by {m} and {'adds' if sign == '+' else 'subtracts'} {b}"
        sentence = f"{n} thinks of a number, {does}. The result is {c}."
        name, times = "that number", f"{k} times that number"
    else:
        sentence = f"{rng.choice(('Solve', 'Let'))} {m} × x {sign} {b} = {c}."
        name, times = "x", f"{k} × x"
    sought = name
    if rng.random() < 0.75:
        steps.append(Step(unknown, "×", k, times))
        sought = times
        if rng.random() < 0.5:
            steps.append(Step(steps[-1], "+", j, "the sum"))
            sought = f"{times} plus {j}" if told else f"{times} + {j}"
    ask = rng.choice((f"What is {sought}?", f"Find {sought}."))
    return Story([sentence], ask, steps, "", f"{sought[0].upper()}{sought[1:]} is {{}}", n)


def _letters(rng: random.Random) -> Story:
    """Draw a chain of definitions in which each letter uses an earlier one."""
    letters = rng.choice(("abcd", "pqrs", "kmnt"))
    a, b = rng.randint(2, 9), rng.randint(2, 6)
    steps = [Step(a, "×", b, letters[0])]
    lines = [f"{letters[0]} = {a} × {b}"]
    for before, letter in pairwise(letters[: rng.choice((2, 3, 3, 4))]):
        op, number = rng.choice("+−"), rng.randint(2, 20)
        steps.append(Step(steps[-1], op, number, letter))
        lines.append(
            rng.choice((f"{letter} = {before} {op} {number}", f"{before} {op} {number} = {letter}"))
        )
    sought = steps[-1].label
    if len(steps) == 3 and rng.random() < 0.5:
        sought = f"{steps[1].label} + {steps[2].label}"
        steps.append(Step(steps[1], "+", steps[2], sought))
    lead = rng.choice(("Let", "We know that", "Given:"))
    sentence = f"{lead} {', '.join(lines[:-1])} and {lines[-1]}."
    ask = rng.choice((f"Find {sought}.", f"What is {sought}?"))
    return Story([sentence], ask, steps, "", f"{sought} is {{}}", "")


def _trip(rng: random.Random) -> Story:
    """Draw speed times hours, an extra distance, and often the rest of a road."""
    n, m = _people(rng, 2)
    speed, hours, walk = rng.randint(3, 12), rng.randint(2, 6), rng.randint(2, 15)
    ride = Step(speed, "×", hours, "the ride")
    done = Step(ride, "+", walk, "the way so far")
    forms = (
        f"{n} rides {speed} km every hour for {hours} hours.",
        f"For {hours} hours {n} rides at {speed} km an hour.",
    )
    then = (f"Then {n} walks {walk} km.", f"After that {n} goes {walk} km on foot.")
    sentences = [rng.choice(forms), rng.choice(then)]
    if rng.random() < 0.2:
        ask = rng.choice((f"How far does {n} get in km?", "How many km is that?"))
        return Story(sentences, ask, [ride, done], "km", f"{n} goes {{}} km", m)
    road = min(99, done.result + rng.randint(2, 20))
    rest = Step(road, "−", done, "the rest")
    sentences.append(f"The road is {road} km long.")
    if rng.random() < 0.4:
        days = rng.choice((2, 3, 4))
        sentences.append(f"{n} wants to do the rest in {days} days.")
        steps = [ride, done, rest, Step(rest, "÷", days, "one day")]
        return Story(sentences, "How many km is that a day?", steps, "km", "It is {} km a day", m)
    ask = rng.choice(("How many km are left?", f"How many km must {n} still go?"))
    return Story(sentences, ask, [ride, done, rest], "km", "There are {} km left", m)


_KINDS: dict[str, Callable[[random.Random], Story]] = {
    "inventory": _inventory,
    "money": _money,
    "compare": _compare,
    "equation": _equation,
    "letters": _letters,
    "trip": _trip,
}
KINDS = tuple(_KINDS)


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
