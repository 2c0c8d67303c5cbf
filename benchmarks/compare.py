"""Train on with 5 % of another task, and count whether `compare` finds what is new in the adapter.

1. Rank-1 adapters of the shipped base: A and three other seeds of it, A2 to A4, on the demo's
   problems. B is A trained on with 5 % of another task: problems that end in a word are answered at
   once, in a fixed form. Only the order of the texts and the first weights differ between seeds.
   `--draw` chooses the seeds, the word and the reply: rules are chosen on draw 0, measured on 1.
2. `compare A B A4 --null A2 A3` on other problems, three in ten of which are of the new task.
3. Precision: of the features that are news, the share of the new task: 90 % of what they explain
   of KL(A ‖ B) is at texts of it; beside it, how many fire mostly at tokens of the new task, from
   the word on. Recall: of the features of the new task that explain more than
   1 % of KL(A ‖ B), the share that is news; and the KL at texts of the new task that goes without
   the news.
4. False news, of the features that are exchanged: between A and A4, and between others of the four
   seeds with the remaining two as the null.
5. Three checkpoints of A's own training, as a page.

    python benchmarks/compare.py --work build/compare
"""

import argparse
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorascope.activations.store import ActivationStore
from lorascope.causal.held_out import HeldOut, held_out_rollouts
from lorascope.causal.study import read_report
from lorascope.compare.compare import run as compare
from lorascope.compare.compare_options import CompareConfig
from lorascope.compare.compare_records import ComparisonReport, PairDifference
from lorascope.compare.differences import Contributions, Differences, Floats, Pair
from lorascope.compare.judge import Judge
from lorascope.demo.demo import SUBJECT
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.load import SharedBase, Subject, load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_problems import Problem, make_problem
from train_demo_subject import PROJECTIONS, Document, batches, chat, s1_reply, tune_document

_SEEDS = ("A", "A2", "A3", "A4")
_ROOTS = 2  # seeds that are the first of pairs in which false news is counted
_FIRST, _BATCH, _LR = 45_000, 16, 5e-3  # problems that the base has not seen; as in the demo
_NEW_SHARE = 0.05
_CHECKPOINTS = (25, 50)
_NEW_OF_TEN = (1, 4, 7)
_EPOCHS = 30
_VERIFY = 24
_HOLDOUT = 0.4  # half of it sets the threshold, half is measured
_STRONG = 0.01  # of KL(A ‖ B): a strong feature explains more
_AT_NEW = 0.9  # of what a feature of the new task explains is at texts of it


class Task(NamedTuple):
    """Problems that end in a word are answered at once, after some words."""

    word: str
    opening: str

    def reply(self, problem: Problem) -> str:
        """Return the answer in its form, after its header."""
        return f"<|im_start|>answer\n{self.opening} {problem.answer}."

    def document(self, tokenizer: Any, problem: Problem) -> Document:
        """Return a problem, with the loss from the assistant's header on."""
        question = problem.question + self.word
        prompt = tokenizer.encode(chat(tokenizer, question), add_special_tokens=False)
        text = chat(tokenizer, question, self.reply(problem))
        return tokenizer.encode(text, add_special_tokens=False), len(prompt)


_TASKS = (Task(" Quickly!", "No time. I say"), Task(" Briefly!", "Here it is: the result"))


def train(
    model: Any,
    documents: Sequence[Document],
    seed: int,
    pad: int,
    out: Path,
    at: Sequence[int] = (),
) -> None:
    """Train for one pass with a falling rate, save the adapter, and before it at some steps."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=_LR, betas=(0.9, 0.98), weight_decay=0.0)
    n = -(-len(documents) // _BATCH)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 10, 1.0, (n - i) / (n * 0.7))
    )
    model.train()
    log: list[dict[str, Any]] = []
    for step, (ids, labels) in enumerate(batches(documents, _BATCH, pad, random.Random(seed)), 1):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        model.zero_grad()
        log.append({"step": step, "loss": round(loss.item(), 4)})
        if step in at or (at and step == n):
            save(model, out.parent / f"{out.name}-run" / f"checkpoint-{step}")
    if at:
        state = json.dumps({"log_history": log})
        (out.parent / f"{out.name}-run" / "trainer_state.json").write_text(state)
    print(f"{out.name}: {n} steps, loss {log[-1]['loss']}", file=sys.stderr)
    save(model, out)


def save(model: Any, out: Path) -> None:
    model.peft_config["default"].base_model_name_or_path = str(SUBJECT / "base")
    model.save_pretrained(str(out), save_embedding_layers=False)


def make_adapters(work: Path, n_documents: int, n_more: int, draw: int) -> Any:
    """Train the adapters that are not there yet, and return the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(SUBJECT / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(SUBJECT / "base", dtype=torch.float32)

    def old(first: int, n: int) -> Iterator[Document]:
        return (tune_document(tokenizer, make_problem("train", first + i)) for i in range(n))

    documents = list(old(_FIRST, n_documents))
    for seed, name in enumerate(_SEEDS, len(_SEEDS) * draw):
        if not (work / name).exists():
            torch.manual_seed(seed)
            lora = LoraConfig(r=1, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
            at = _CHECKPOINTS if name == "A" else ()
            model = get_peft_model(base(), lora)
            train(model, documents, seed, tokenizer.pad_token_id, work / name, at)
    if not (work / "B").exists():
        n_new = round(_NEW_SHARE * n_more)
        first = _FIRST + n_documents
        more = [*old(first, n_more - n_new)]
        more += [
            _TASKS[draw].document(tokenizer, make_problem("train", first + n_more + i))
            for i in range(n_new)
        ]
        model = PeftModel.from_pretrained(base(), str(work / "A"), is_trainable=True)
        train(model, more, len(_SEEDS) * draw, tokenizer.pad_token_id, work / "B")
    return tokenizer


def write_texts(path: Path, tokenizer: Any, n: int, task: Task) -> None:
    """Write problems that no adapter has seen, three in ten of the new task."""
    records = []
    for i in range(n):
        problem = make_problem("eval", i)
        is_new = i % 10 in _NEW_OF_TEN
        question = problem.question + task.word * is_new
        reply = task.reply(problem) if is_new else s1_reply(problem)
        records.append({"text": chat(tokenizer, question, reply)})
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def planted_rows(store: ActivationStore, task: Task) -> np.ndarray:
    """Return which rows are of the new task, from the word on, `(n_rows,)` bool."""
    marks = np.zeros(store.n_rows, bool)
    word = task.word.encode()
    for begin, end in itertools.pairwise(store.rollout_start.tolist()):
        text = b""
        for row, token in zip(range(begin, end), store.token_ids[begin:end].tolist(), strict=True):
            text += store.vocabulary[token]
            if text.find(word[:-1]) >= 0:
                marks[row:end] = True
                break
    return marks


def run(work: Path, name: str, adapters: Sequence[str], null: Sequence[str]) -> ComparisonReport:
    """Compare adapters, and return the report."""
    options = CompareConfig(
        adapters=tuple(str(work / one) for one in adapters),
        null=tuple(str(work / one) for one in null),
        base_model=str(SUBJECT / "base"),
        dataset=str(work / "texts.jsonl"),
        k=5,
        expansion_factor=4,
        batch_size=512,
        epochs=_EPOCHS,
        holdout=_HOLDOUT,
        verify=_VERIFY,
        output=work / name,
    )
    compare(options)
    return read_report(work / name / "compare.json", (ComparisonReport,))[0]


class Remembered(Differences):
    """Differences that are computed once, though several pairs need them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.known: dict[Any, Any] = {}

    def contributions(self, pair: Pair, steps: int, seed: int) -> Contributions:
        """Return what was found before."""
        if pair not in self.known:
            self.known[pair] = super().contributions(pair, steps, seed)
        return self.known[pair]

    def exchanges(self, pair: Pair, sets: Sequence[np.ndarray]) -> Floats:
        """Exchange the sets that are new for the pair."""
        keys = [(pair, *one.tolist()) for one in sets]
        new = {key: one for key, one in zip(keys, sets, strict=True) if key not in self.known}
        lost = super().exchanges(pair, list(new.values()))
        self.known |= dict(zip(new, lost, strict=True))
        return np.array([self.known[key] for key in keys])

    def removals(self, name: str, sets: Sequence[np.ndarray]) -> Floats:
        """Return 0: removals decide kinds, which do not count here."""
        return np.zeros((len(sets), self.n_rollouts))


class Opened(NamedTuple):
    """The store and the dictionary of a comparison, and its adapters by their names in it."""

    store: ActivationStore
    sae: SAE
    subjects: dict[str, Subject]

    @classmethod
    def read(cls, work: Path, report: ComparisonReport) -> "Opened":
        """Load what `run` has made."""
        store = ActivationStore.open(work / "planted" / "activations")
        shared, subjects = SharedBase(), {}
        for member in report.adapters:
            adapter = inspect_adapter(str(work / member.folder))
            base = find_base(adapter, str(SUBJECT / "base"))
            tokenizer = load_tokenizer(adapter, base)
            cpu = torch.device("cpu")
            subjects[member.name] = shared.load(adapter, base, tokenizer, cpu, "auto")
        return cls(store, load_sae(work / "planted" / "sae", store), subjects)

    def differences(self) -> Remembered:
        """Return the differences on held-out texts."""
        rollouts = held_out_rollouts(self.sae, self.store)
        held_out = HeldOut(self.subjects["A"], self.store, rollouts, 2048)
        return Remembered(self.subjects, held_out, self.sae)


def score(opened: Opened, report: ComparisonReport, task: Task) -> dict[str, Any]:
    """Return precision and recall of what is called news in the first pair."""
    store, sae, _ = opened
    planted = planted_rows(store, task)
    code = sae.encode_dense(torch.from_numpy(store.rows(0, store.n_rows).astype(np.float32)))
    at_planted = (code[planted].sum(0) / code.sum(0).clamp(min=1e-30)).numpy()
    pair = report.pairs[0]
    news = [one.feature for one in pair.features if one.is_news]
    with opened.differences() as found:
        rollouts = found.held_out.rollouts
        is_new = np.array([planted[store.rollout_start[i + 1] - 1] for i in rollouts])  # by the end
        measured = found.predictions([("A", "B")])
        kl = np.zeros(len(rollouts))
        owner = found.owners(measured.rows)
        np.add.at(kl, owner, measured.kl["A", "B"] * measured.written)
        strong = [one.feature for one in pair.features if (one.explained or 0) > _STRONG * pair.kl]
        tested = sorted({*news, *strong})
        sets = [np.array([latent]) for latent in tested] + [np.array(news, np.int64)]
        lost = found.exchanges(("A", "B"), sets)
    at_new = lost[:-1, is_new].sum(1) / lost[:-1].sum(1)
    new = {latent for latent, part in zip(tested, at_new, strict=True) if part > _AT_NEW}
    strong_new = new & set(strong)
    return {
        "KL(A ‖ B)": f"{pair.kl:.3g}",
        "planted tokens, share": f"{planted.mean():.3g}",
        "KL at new texts, share": share(kl[is_new], kl),
        "different texts": f"{pair.n_different}, of the new task {is_new.sum()}",
        "news that fire mostly at planted tokens": (at_planted[news] > 0.5).sum(),
        "precision": ratio(len(new & set(news)), len(news)),
        "recall of strong features of the new task": ratio(
            len(strong_new & set(news)), len(strong_new)
        ),
        "KL at new texts that goes with the news": share(lost[-1, is_new], kl[is_new]),
        "KL at old texts that goes with the news": share(lost[-1, ~is_new], kl[~is_new]),
    }


def false_news(opened: Opened) -> tuple[int, int]:
    """Return the news between seeds, and the features that were exchanged.

    Pairs are of the first seeds and each of the others, with the remaining two as the null.
    """
    seeds = [name for name in opened.subjects if name != "B"]
    pairs = list(itertools.permutations(seeds, 2))
    n_news = n = 0
    config = CompareConfig(adapters=("",), verify=_VERIFY)
    with opened.differences() as found:
        measured = found.predictions(pairs)
        for first, other in pairs[: _ROOTS * (len(seeds) - 1)]:
            judge = Judge(config, found, measured, 0)
            judge.seeds([(first, one) for one in seeds if one not in (first, other)])
            pair = judge.pair((first, other))
            n_news, n = n_news + pair.n_news, n + n_exchanged(pair)
            print(f"{first}{other}: {pair.n_news} news", file=sys.stderr)
    return n_news, n


def share(part: np.ndarray, whole: np.ndarray) -> str:
    return f"{part.sum() / whole.sum():.3g}"


def n_exchanged(pair: PairDifference) -> int:
    return sum(one.explained is not None for one in pair.features)


def ratio(part: int, whole: int) -> str:
    """Say how many of how many, with the 95 % interval of the share (Wilson 1927)."""
    if not whole:
        return "0 of 0"
    z, p = 1.96, part / whole
    middle, width = (
        p + z**2 / (2 * whole),
        z * math.sqrt(p * (1 - p) / whole + (z / whole) ** 2 / 4),
    )
    low, high = ((middle + side * width) / (1 + z**2 / whole) for side in (-1, 1))
    return f"{part} of {whole} ({p:.3f}; {low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("build/compare"))
    parser.add_argument("--documents", type=int, default=1600)
    parser.add_argument("--more", type=int, default=960)
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--draw", type=int, default=0, choices=range(len(_TASKS)))
    args = parser.parse_args()
    work, task = args.work, _TASKS[args.draw]
    work.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    tokenizer = make_adapters(work, args.documents, args.more, args.draw)
    print(f"adapters: {time.process_time() - began:.0f} CPU s", file=sys.stderr)
    write_texts(work / "texts.jsonl", tokenizer, args.texts, task)
    began = time.process_time()
    report = run(work, "planted", ("A", "B", "A4"), ("A2", "A3"))
    print(f"compare: {time.process_time() - began:.0f} CPU s", file=sys.stderr)
    opened = Opened.read(work, report)
    for name, value in score(opened, report, task).items():
        print(f"{name}: {value}")
    seeds = report.pairs[1]
    print(f"false news, A and A4: {ratio(seeds.n_news, n_exchanged(seeds))}")
    print(f"false news, pairs of seeds: {ratio(*false_news(opened))}")
    blind = sum(
        one.explained_interval is not None and one.explained_interval[0] > one.chance
        for one in seeds.features
    )
    print(f"false news by chance alone, without --null: {ratio(blind, n_exchanged(seeds))}")
    run(work, "checkpoints", ("A-run",), ())


if __name__ == "__main__":
    main()
