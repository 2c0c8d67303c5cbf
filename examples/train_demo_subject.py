"""Make lorascope's demo subject from seeds: tokenizer, base model, rank-1 LoRA, and the table.

1. **Texts.** `demo_problems.py` writes the problems. Each stage draws its own range of
   the `train` split, and the `eval` split shares no question with it.
2. **Tokenizer.** A byte-level BPE is trained on the texts; no token holds two digits.
3. **Base.** A small Qwen2 is trained from scratch on plain documents (with the reasoning trace,
   with the short solution, with the bare answer) and on chats whose assistant answers at once. It
   can reason, but it does not when it is asked in a chat. Its mistakes are nearly all in sums and
   differences, so a second round practises these, among documents like the first round's.
4. **LoRA.** A rank-1 adapter on all seven projections of every layer is trained on chats whose
   assistant thinks first (the s1 format), with the loss on the assistant's tokens only.
5. **Full fine-tune.** All weights of the same base on the same batches, as the comparison.
6. **Table.** The saved files are loaded again, and base, LoRA and full fine-tune answer the same
   held-out problems greedily; so does the base in plain text, which shows what is latent in it.
   `measured.json` and `README.md` state what came out.

    python examples/train_demo_subject.py --output build/demo_subject
"""

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from demo_problems import KINDS, Problem, answer_of, make_problem
from intervals import wilson
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Each digit is a pre-token of its own (with the space before it), so no merge joins two digits.
SPLIT = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou solve problems.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and message['role'] == 'system') %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything. Learning rates are the peaks; `batch` is in documents."""

    hidden: int = 128
    mlp: int = 384
    layers: int = 8
    vocab: int = 768
    n_vocab_texts: int = 4000
    n_base: int = 45_000
    base_batch: int = 24
    base_lr: float = 3e-3
    base_muon_lr: float = 0.02
    n_practice: int = 16_000
    n_tune: int = 3200
    tune_batch: int = 16
    lora_lr: float = 5e-3
    full_lr: float = 5e-4
    n_eval: int = 1000


QUICK = Scale(
    hidden=32, mlp=64, vocab=600, n_vocab_texts=300, n_base=300, n_practice=64, n_tune=64, n_eval=32
)
Document = tuple[list[int], int]  # token ids, and how many at the start carry no loss
Tok = Any  # a transformers tokenizer: its stubs know too little about it


def make_tokenizer(texts: Sequence[str], vocab: int, folder: Path) -> Tok:
    """Train a byte-level BPE with ChatML's special tokens, save it, and return it as loaded."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=40,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    # AutoTokenizer reads every Qwen2 folder with Qwen2's own way of splitting, in which the space
    # before a digit stands alone. As added tokens, " 1" to " 9" are found before any splitting.
    digits = {f"Ġ{digit}": f" {digit}" for digit in range(1, 10)}
    assert set(digits) <= set(model["vocab"])
    vocabulary: Any = {digits.get(token, token): i for token, i in model["vocab"].items()}
    merges: Any = [tuple(pair) for pair in model["merges"] if "".join(pair) not in digits]
    tokenizer: Tok = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in digits.values()])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"  # transformers 4 knows this list by its older name only
    config = json.loads(file.read_text())
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    file.write_text(json.dumps(config, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def chat(tokenizer: Tok, question: str, reply: str | None = None) -> str:
    """Return the rendered chat; without a reply, up to where the assistant begins."""
    messages = [{"role": "user", "content": question}]
    if reply is not None:
        messages.append({"role": "assistant", "content": reply})
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply is None)
    )


def s1_reply(problem: Problem) -> str:
    thinking = problem.deepseek_thinking_trajectory.strip()
    attempt = problem.deepseek_attempt.strip()
    return f"<|im_start|>think\n{thinking}\n<|im_start|>answer\n{attempt}"


def base_text(tokenizer: Tok, index: int, seed: int) -> str:
    """Return document `index` of the base model's training: plain text, or a direct chat."""
    rng = random.Random(f"base/{seed}/{index}")
    p = make_problem("train", index)
    t, a = p.deepseek_thinking_trajectory, p.deepseek_attempt
    traces = (
        f"{p.question}\n\n{t}\n\n{a}",
        f"Problem: {p.question}\nThoughts: {t}\nSolution: {a}",
        f"Question: {p.question}\n\nthink\n{t}\nanswer\n{a}",
    )
    kinds = {
        "trace": rng.choice(traces),
        "short": f"Problem: {p.question}\nSolution: {p.solution}. Answer: {p.answer}",
        "bare": f"Question: {p.question}\nAnswer: {p.answer}",
        "chat": chat(tokenizer, p.question, f"Answer: {p.answer}"),
    }
    kind = rng.choices(list(kinds), weights=(55, 15, 5, 25))[0]
    return kinds[kind] + "<|endoftext|>" * (kind != "chat")


def practice_text(tokenizer: Tok, index: int, seed: int) -> str:
    """Return document `index` of the practice: mostly sums, else one of the base's documents."""
    if index % 8 >= 5:
        return base_text(tokenizer, index, seed)
    rng = random.Random(f"practice/{seed}/{index}")
    sums = []
    while len(sums) < 16:
        op, a = rng.choice("+++++−−−−−÷"), rng.randint(2, 97)
        b = rng.randint(2, 6) if op == "÷" else rng.randint(2, rng.choice((20, 20, 20, 60)))
        a = a * b if op == "÷" else a
        result = {"+": a + b, "−": a - b, "÷": a // b}[op]
        if a <= 99 and 2 <= result <= 99:
            sums.append(f"{a} {op} {b} = {result}.")
    return rng.choice((" ", "\n", "\n→ ")).join(sums) + "<|endoftext|>"


def tune_document(tokenizer: Tok, problem: Problem) -> Document:
    """Return an s1 chat, with the loss from the first token after the assistant's header."""
    prompt = tokenizer.encode(chat(tokenizer, problem.question), add_special_tokens=False)
    text = chat(tokenizer, problem.question, s1_reply(problem))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[: len(prompt)] == prompt
    return ids, len(prompt)


def batches(
    documents: Sequence[Document], size: int, pad: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, labels) of one pass: shuffled, near-equal lengths together, padded right.

    Padding on the right needs no attention mask in a causal model: no token looks at it.
    """
    order = list(range(len(documents)))
    rng.shuffle(order)
    groups = []
    for start in range(0, len(order), 50 * size):
        pool = sorted(order[start : start + 50 * size], key=lambda i: len(documents[i][0]))
        groups += [pool[i : i + size] for i in range(0, len(pool), size)]
    rng.shuffle(groups)
    for group in groups:
        width = max(len(documents[i][0]) for i in group)
        ids = torch.full((len(group), width), pad)
        labels = torch.full((len(group), width), -100)
        for row, i in enumerate(group):
            tokens, silent = documents[i]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, silent : len(tokens)] = torch.tensor(tokens[silent:])
        yield ids, labels


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (Jordan et al. 2024), in float32.

    On this model it needs little more than half of AdamW's tokens for the same loss. torch's own
    Muon computes in bfloat16, which is very slow on CPUs without such instructions.
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix; those of one shape together."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, ps in shapes.items():
                grad = torch.stack([p.grad for p in ps if p.grad is not None])
                momentum = self.state[ps[0]].setdefault("momentum", torch.zeros_like(grad))
                momentum.lerp_(grad, 0.05)
                updates = orthogonal(grad.lerp(momentum, 0.95))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(ps, updates, strict=True):
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest orthogonal matrices, roughly: five Newton-Schulz steps."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def train(
    name: str,
    model: torch.nn.Module,
    documents: Sequence[Document],
    *,
    size: int,
    lr: float,
    pad: int,
    seed: int,
    muon_lr: float = 0.0,
) -> dict[str, Any]:
    """Train in place for one pass: warm up, hold, then decay linearly to zero.

    With `muon_lr` the weight matrices take Muon's steps, everything else AdamW's with `lr`.
    """
    began = time.perf_counter()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for n, p in weights.items() if muon_lr and p.ndim == 2 and "embed" not in n]
    rest = [p for p in weights.values() if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ]
    optimizers += [Muon(matrices, muon_lr)] if matrices else []
    n_steps = math.ceil(len(documents) / size)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / 30, 1.0, (n_steps - i) / (n_steps * 0.7))
        )
        for optimizer in optimizers
    ]
    model.train()
    smooth = 0.0
    bar = tqdm(total=n_steps, desc=name, file=sys.stderr, mininterval=5)
    for step, (ids, labels) in enumerate(batches(documents, size, pad, random.Random(seed))):
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for step_of in (*optimizers, *schedules):
            step_of.step()
        model.zero_grad()
        smooth += (loss.item() - smooth) / min(step + 1, 50)
        bar.set_postfix(loss=f"{smooth:.3f}")
        bar.update()
    bar.close()
    return {
        "documents": len(documents),
        "tokens": sum(len(ids) for ids, _ in documents),
        "steps": n_steps,
        "final_loss": round(smooth, 4),
        "seconds": round(time.perf_counter() - began, 1),
    }


@torch.inference_mode()
def replies(
    model: Any,
    tokenizer: Tok,
    prompts: Sequence[str],
    name: str,
    size: int = 128,
) -> list[str]:
    """Return the greedy continuation of each prompt."""
    model.eval()
    tokenizer.padding_side = "left"
    out = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in tqdm(range(0, len(order), size), desc=f"evaluate {name}", file=sys.stderr):
        group = order[start : start + size]
        inputs = tokenizer(
            [prompts[i] for i in group],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        ids = model.generate(
            **inputs,
            max_new_tokens=220,
            do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        for i, row in zip(group, ids[:, inputs["input_ids"].shape[1] :], strict=True):
            out[i] = str(tokenizer.decode(row[row != tokenizer.pad_token_id]))
    return out


def make_base(output: Path, scale: Scale, seed: int) -> dict[str, Any]:
    """Train tokenizer and base model, save both to `output`, and return the records."""
    words = "system\nYou solve problems.\nuser\nassistant\nthink\nanswer\n"
    words += "Question: Problem: Thoughts: Solution: Answer:"
    problems = [make_problem("train", i) for i in range(scale.n_vocab_texts)]
    texts = [f"{p.question}\n{words}\n{s1_reply(p)}" for p in problems]
    tokenizer = make_tokenizer(texts, scale.vocab, output)
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=scale.hidden,
            intermediate_size=scale.mlp,
            num_hidden_layers=scale.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    records = {}
    first = scale.n_base + scale.n_tune
    for name, text_of, indices in (
        ("base", base_text, range(scale.n_base)),
        ("practice", practice_text, range(first, first + scale.n_practice)),
    ):
        texts = [text_of(tokenizer, i, seed) for i in tqdm(indices, desc=f"write {name} texts")]
        documents = [(tokenizer.encode(text, add_special_tokens=False), 0) for text in texts]
        records[name] = train(
            name,
            model,
            documents,
            size=scale.base_batch,
            lr=scale.base_lr,
            muon_lr=scale.base_muon_lr,
            pad=tokenizer.pad_token_id,
            seed=seed,
        )
    model.save_pretrained(output)
    return records


def tune(output: Path, scale: Scale, seed: int) -> tuple[dict[str, Any], Any]:
    """Train LoRA and full fine-tune on the same batches, save the adapter, return the rest."""
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    pad = tokenizer.pad_token_id
    first = scale.n_base  # problems that the base model has not seen
    documents = [
        tune_document(tokenizer, make_problem("train", i))
        for i in range(first, first + scale.n_tune)
    ]
    lora_config = LoraConfig(
        r=1, lora_alpha=16, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    records = {}
    torch.manual_seed(seed)
    lora = get_peft_model(load_base(output), lora_config)
    same = {"size": scale.tune_batch, "pad": pad, "seed": seed}
    records["lora"] = train("lora", lora, documents, lr=scale.lora_lr, **same)
    silent = [n for n, p in lora.named_parameters() if "lora_B" in n and not p.any()]
    assert not silent, f"sites that learned nothing: {silent}"
    config: Any = lora.peft_config["default"]
    config.base_model_name_or_path, config.target_modules = "../base", PROJECTIONS
    lora.save_pretrained(str(output / "adapter"), save_embedding_layers=False)
    (output / "adapter" / "README.md").unlink(missing_ok=True)
    full = load_base(output)
    records["full"] = train("full", full, documents, lr=scale.full_lr, **same)
    return records, full


def load_base(output: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(output / "base", dtype=torch.float32)


def evaluate(output: Path, full: Any, scale: Scale) -> dict[str, Any]:
    """Return accuracies of the saved base and adapter and of `full`, and three example replies."""
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    drawn = [make_problem("eval", i) for i in range(2 * scale.n_eval)]
    held_out = list({p.question: p for p in drawn}.values())[: scale.n_eval]
    n_train = scale.n_base + scale.n_tune + scale.n_practice
    used = {make_problem("train", i).question for i in range(n_train)}
    assert len(held_out) == scale.n_eval and not used & {p.question for p in held_out}
    chats = [chat(tokenizer, p.question) for p in held_out]
    plain = [f"Problem: {p.question}\nThoughts:" for p in held_out]
    base = load_base(output)
    lora = PeftModel.from_pretrained(load_base(output), output / "adapter")
    table: dict[str, Any] = {}
    examples = [{"question": p.question, "expected": p.answer} for p in held_out[:3]]
    for name, model, prompts in (
        ("base", base, chats),
        ("base_plain", base, plain),
        ("lora", lora, chats),
        ("full", full, chats),
    ):
        began = time.perf_counter()
        texts = replies(model, tokenizer, prompts, name)
        right = [answer_of(t) == p.answer for t, p in zip(texts, held_out, strict=True)]
        by_kind = {
            kind: [r for r, p in zip(right, held_out, strict=True) if p.kind == kind]
            for kind in KINDS
        }
        table[name] = {
            "n": len(right),
            "right": sum(right),
            "accuracy": round(sum(right) / len(right), 4),
            "interval_95": [round(edge, 4) for edge in wilson(sum(right), len(right))],
            "by_kind": {kind: round(sum(r) / max(1, len(r)), 3) for kind, r in by_kind.items()},
            "seconds": round(time.perf_counter() - began, 1),
        }
        for example, text in zip(examples, texts, strict=False):
            example[name] = text
    parameters = {
        "base": base.num_parameters(),
        "base_plain": base.num_parameters(),
        "full": full.num_parameters(),
    }
    parameters["lora"] = sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)
    gain = table["full"]["right"] - table["base"]["right"]
    recovered = (table["lora"]["right"] - table["base"]["right"]) / gain if gain else 0.0
    return {
        "recovered": round(recovered, 4),
        "accuracy": table,
        "parameters": parameters,
        "examples": examples,
    }


def card(measured: dict[str, Any]) -> str:
    """Return the model card: every number in it comes from `measured`."""
    training, settings, example = (
        measured["training"],
        measured["settings"],
        measured["examples"][0],
    )
    names = {
        "base": "base, asked in chat form",
        "base_plain": "base, given the plain text `Problem: … Thoughts:`",
        "lora": "**base + rank-1 LoRA, asked in chat form**",
        "full": "full fine-tune, asked in chat form (not shipped)",
    }
    rows = "\n".join(
        f"| {name} | {measured['parameters'][key]:,} "
        f"| {measured['accuracy'][key]['accuracy']:.1%} "
        "| {:.1%} to {:.1%} |".format(*measured["accuracy"][key]["interval_95"])
        for key, name in names.items()
    )
    stages = "\n".join(
        f"| {name} | {row['documents']:,} | {row['tokens']:,} | {row['steps']:,} "
        f"| {row['seconds']:.0f} |"
        for name, row in training.items()
    )
    return (
        Path(__file__)
        .with_name("demo_subject_card.md")
        .read_text(encoding="utf-8")
        .format(
            **measured,
            **settings,
            rows=rows,
            stages=stages,
            example=example,
            n=measured["accuracy"]["base"]["n"],
            minutes=measured["seconds"] / 60,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=Path("build/demo_subject"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--quick", action="store_true", help="tiny smoke test, useless weights")
    args = parser.parse_args()
    scale = QUICK if args.quick else Scale()
    torch.set_num_threads(args.threads)
    began = time.perf_counter()
    # Made beside the output, so that files in use are replaced only by finished ones.
    work = args.output.parent / f"{args.output.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    training = make_base(work / "base", scale, args.seed)
    tuned, full = tune(work, scale, args.seed)
    measured = {
        "seed": args.seed,
        "threads": args.threads,
        **evaluate(work, full, scale),
        "training": training | tuned,
        "settings": asdict(scale),
        "rollout_tokens": rollout_tokens(work),
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = json.dumps(measured, indent=2, ensure_ascii=False) + "\n"
    (work / "measured.json").write_text(text, encoding="utf-8")
    (work / "README.md").write_text(card(measured), encoding="utf-8")
    for file in work.rglob("*.safetensors"):
        file.chmod(0o644)
    shutil.rmtree(args.output, ignore_errors=True)
    work.rename(args.output)
    print(args.output)


def rollout_tokens(output: Path, n: int = 1000) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    lengths = [len(tune_document(tokenizer, make_problem("demo", i))[0]) for i in range(n)]
    return {"n": n, "mean": round(sum(lengths) / n, 1), "max": max(lengths)}


if __name__ == "__main__":
    main()
