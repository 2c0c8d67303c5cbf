"""Train on with 5 % of another task, and count whether `compare` finds what is new in the adapter.

1. Rank-1 adapters of the shipped base: A and two other seeds of it, A2 and A3, on the demo's
   problems. B is A trained on with 5 % of another task: problems that end in a word are answered at
   once, in a fixed form. Only the order of the texts and the first weights differ between seeds.
2. `compare A B --null A2` on other problems, three in ten of which are of the new task.
3. Precision: of the features that are news, the share of the new task: 90 % of what they explain
   of KL(A ‖ B) is at texts of it; beside it, how many fire mostly at tokens of the new task, from
   the word on. Recall: of the features of the new task that explain more than
   1 % of KL(A ‖ B), the share that is news; and the KL at texts of the new task that goes without
   the news.
4. False news: `compare A A3 --null A2`: news per feature that fires.
5. Three checkpoints of A's own training, as a page.

    python benchmarks/compare.py --work build/compare
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorascope.activations.store import ActivationStore
from lorascope.causal.held_out import HeldOut, held_out_rollouts
from lorascope.causal.study import read_report
from lorascope.compare.compare import run as compare
from lorascope.compare.compare_options import CompareConfig
from lorascope.compare.compare_records import ComparisonReport
from lorascope.compare.differences import Differences
from lorascope.demo.demo import SUBJECT
from lorascope.sae.model import load_sae
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.load import SharedBase, load_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_problems import Problem, make_problem
from train_demo_subject import PROJECTIONS, Document, batches, chat, s1_reply, tune_document

_WORD, _REPLY = " Quickly!", "No time. I say"
_FIRST, _BATCH, _LR = 45_000, 16, 5e-3  # problems that the base has not seen; as in the demo
_NEW_SHARE = 0.05
_CHECKPOINTS = (25, 50)
_NEW_OF_TEN = (1, 4, 7)
_EPOCHS = 30
_HOLDOUT = 0.4  # half of it sets the threshold, half is measured
_STRONG = 0.01  # of KL(A ‖ B): a strong feature explains more
_AT_NEW = 0.9  # of what a feature of the new task explains is at texts of it


def new_document(tokenizer: Any, problem: Problem) -> Document:
    """Return a problem of the new task, with the loss from the assistant's header on."""
    question = problem.question + _WORD
    prompt = tokenizer.encode(chat(tokenizer, question), add_special_tokens=False)
    text = chat(tokenizer, question, new_reply(problem))
    return tokenizer.encode(text, add_special_tokens=False), len(prompt)


def new_reply(problem: Problem) -> str:
    return f"<|im_start|>answer\n{_REPLY} {problem.answer}."


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


def make_adapters(work: Path, n_documents: int, n_more: int) -> Any:
    """Train the adapters that are not there yet, and return the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(SUBJECT / "base")

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(SUBJECT / "base", dtype=torch.float32)

    def old(first: int, n: int) -> Iterator[Document]:
        return (tune_document(tokenizer, make_problem("train", first + i)) for i in range(n))

    documents = list(old(_FIRST, n_documents))
    for seed, name in enumerate(("A", "A2", "A3")):
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
            new_document(tokenizer, make_problem("train", first + n_more + i)) for i in range(n_new)
        ]
        model = PeftModel.from_pretrained(base(), str(work / "A"), is_trainable=True)
        train(model, more, 0, tokenizer.pad_token_id, work / "B")
    return tokenizer


def write_texts(path: Path, tokenizer: Any, n: int) -> None:
    """Write problems that no adapter has seen, three in ten of the new task."""
    records = []
    for i in range(n):
        problem = make_problem("eval", i)
        is_new = i % 10 in _NEW_OF_TEN
        question = problem.question + _WORD * is_new
        reply = new_reply(problem) if is_new else s1_reply(problem)
        records.append({"text": chat(tokenizer, question, reply)})
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


def planted_rows(store: ActivationStore) -> np.ndarray:
    """Return which rows are of the new task, from the word on, `(n_rows,)` bool."""
    marks = np.zeros(store.n_rows, bool)
    word = _WORD.encode()
    for begin, end in itertools.pairwise(store.rollout_start.tolist()):
        text = b""
        for row, token in zip(range(begin, end), store.token_ids[begin:end].tolist(), strict=True):
            text += store.vocabulary[token]
            if text.find(word[:-1]) >= 0:
                marks[row:end] = True
                break
    return marks


def run(work: Path, name: str, adapters: Sequence[str], null: str | None) -> ComparisonReport:
    """Compare adapters, and return the report."""
    options = CompareConfig(
        adapters=tuple(str(work / one) for one in adapters),
        null=None if null is None else str(work / null),
        base_model=str(SUBJECT / "base"),
        dataset=str(work / "texts.jsonl"),
        k=5,
        expansion_factor=4,
        batch_size=512,
        epochs=_EPOCHS,
        holdout=_HOLDOUT,
        verify=24,
        output=work / name,
    )
    compare(options)
    return read_report(work / name / "compare.json", (ComparisonReport,))[0]


def score(work: Path, report: ComparisonReport) -> dict[str, Any]:
    """Return precision and recall of what is called news in the first pair."""
    out = work / "planted"
    store = ActivationStore.open(out / "activations")
    sae = load_sae(out / "sae", store)
    planted = planted_rows(store)
    code = sae.encode_dense(torch.from_numpy(store.rows(0, store.n_rows).astype(np.float32)))
    at_planted = (code[planted].sum(0) / code.sum(0).clamp(min=1e-30)).numpy()
    pair = report.pairs[0]
    news = [one.feature for one in pair.features if one.is_news]
    shared, subjects = SharedBase(), {}
    for member in report.adapters:
        adapter = inspect_adapter(str(work / member.folder))
        base = find_base(adapter, str(SUBJECT / "base"))
        tokenizer = load_tokenizer(adapter, base)
        subjects[member.name] = shared.load(adapter, base, tokenizer, torch.device("cpu"), "auto")
    rollouts = held_out_rollouts(sae, store)
    is_new = np.array([planted[store.rollout_start[i + 1] - 1] for i in rollouts])  # by the end
    with Differences(subjects, HeldOut(subjects["A"], store, rollouts, 2048), sae) as found:
        measured = found.predictions([("A", "B")])
        kl = np.zeros(len(rollouts))
        owner = [found.number[i] for i in store.rollout_of(measured.rows).tolist()]
        np.add.at(kl, owner, measured.pairs["A", "B"] * measured.written)
        strong = [one.feature for one in pair.features if (one.explained or 0) > _STRONG * pair.kl]
        tested = sorted({*news, *strong})
        sets = [np.array([latent]) for latent in tested] + [np.array(news, np.int64)]
        lost = found.exchanges(("A", "B"), sets)
    at_new = lost[:-1, is_new].sum(1) / lost[:-1].sum(1)
    new = {latent for latent, share in zip(tested, at_new, strict=True) if share > _AT_NEW}
    strong_new = new & set(strong)
    return {
        "planted tokens, share": planted.mean(),
        "KL at new texts, share": kl[is_new].sum() / kl.sum(),
        "news": len(news),
        "news that fire mostly at planted tokens": int((at_planted[news] > 0.5).sum()),
        "precision": len(new & set(news)) / len(news) if news else None,
        "strong features of the new task": len(strong_new),
        "recall of these": len(strong_new & set(news)) / max(len(strong_new), 1),
        "KL at new texts that goes without the news": lost[-1, is_new].sum() / kl[is_new].sum(),
        "KL at old texts that goes without the news": lost[-1, ~is_new].sum() / kl[~is_new].sum(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--work", type=Path, default=Path("build/compare"))
    parser.add_argument("--documents", type=int, default=1600)
    parser.add_argument("--more", type=int, default=960)
    parser.add_argument("--texts", type=int, default=400)
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    tokenizer = make_adapters(work, args.documents, args.more)
    print(f"adapters: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    write_texts(work / "texts.jsonl", tokenizer, args.texts)
    began = time.perf_counter()
    planted = run(work, "planted", ("A", "B"), "A2")
    print(f"compare: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    for name, value in score(work, planted).items():
        print(f"{name}: {value:.3g}" if value is not None else f"{name}: none")
    seeds = run(work, "seeds", ("A", "A3"), "A2").pairs[0]
    n = sum(seeds.n_kinds.values())
    print(f"false news of seeds: {seeds.n_news} of {n} features ({seeds.n_news / n:.2%})")
    blind = sum(
        one.explained_interval is not None and one.explained_interval[0] > one.chance
        for one in seeds.features
    )
    print(f"false news by chance alone, without --null: {blind} of {n} ({blind / n:.2%})")
    run(work, "checkpoints", ("A-run",), None)


if __name__ == "__main__":
    main()
