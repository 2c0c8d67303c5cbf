"""Measure how fast rows are read, next to the bare forward pass and the published way.

    python benchmarks/generate.py                            # CPU: 8 layers of 512, float32
    python benchmarks/generate.py --dtype bfloat16
    python benchmarks/generate.py --device cuda --model qwen2.5-32b --dtype bfloat16 --long

Three ways take every batch of the same documents, in an order shuffled for each batch:

- `lorascope`: what the stage does, up to rows in the stored type on the host.
- `bare`: the base model alone on the same batches: no adapter, no lm_head, nothing read. It runs
  twice; the second run shows the noise of the measurement.
- `published`: one document at a time through PEFT's forward with the lm_head, each site's output
  copied to the host by its own hook.

Prints tokens per second (padding does not count), the ratio of time to `bare` (median over the
batches, with quartiles), and how far the rows of the ways differ.
"""

import argparse
import copy
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Qwen2Config, Qwen2ForCausalLM

from lorascope.activations.capture import Capture, plan_batches
from lorascope.sites import PROJECTIONS, Site, SiteLayout
from lorascope.subject.adapter import Adapter
from lorascope.subject.base import Base
from lorascope.subject.hooks import RowReader
from lorascope.subject.load import Subject
from lorascope.texts.rollouts import Rollout

MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    "tiny": {  # for rehearsals
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "qwen2.5-32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}


def build(model: str, device: torch.device, dtype: torch.dtype) -> tuple[Subject, Any]:
    """Return a subject with random weights and rank-1 LoRA on everything, and its bare base."""
    config = Qwen2Config(**MODELS[model], max_position_embeddings=32768)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        base = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    bare = base.model if device.type == "cuda" else copy.deepcopy(base.model)
    if device.type == "cuda":  # weights once; the modules of the bare one are its own
        bare = _sharing(base).model
    lora = LoraConfig(r=1, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora).eval()
    sites: list[tuple[Site, torch.nn.Module]] = []
    for path, module in adapted.get_submodule("base_model.model").named_modules():
        if isinstance(module, LoraLayer):
            torch.nn.init.normal_(
                adapted.get_parameter(f"base_model.model.{path}.lora_B.default.weight"), std=0.02
            )
            name = path.rsplit(".", 1)[-1]
            site = Site(layer=int(path.split(".")[2]), projection=name, module=path, scale=8.0)
            sites.append((site, adapted.get_submodule(f"base_model.model.{path}.lora_A.default")))
    sites.sort(key=lambda item: item[0].order)
    return (
        Subject(
            model=adapted,
            tokenizer=None,
            layout=SiteLayout(tuple(site for site, _ in sites)),
            sites=tuple(module for _, module in sites),
            mixes=(None,) * len(sites),
            unhooked=(),
            unseen=(),
            quantized=None,
            adapter=Adapter(Path(), "random", {}, {}, ""),
            base=Base(model, Path(), ""),
            device=device,
            dtype=dtype,
        ),
        bare,
    )


def _sharing(base: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Return a model of its own modules around the same weights."""
    with torch.device("meta"):
        twin = Qwen2ForCausalLM(base.config).eval()
    twin.load_state_dict(base.state_dict(), assign=True)
    twin.model.rotary_emb = base.model.rotary_emb
    return twin


def published_way(subject: Subject) -> Callable[[list[Rollout]], list[np.ndarray]]:
    """Return the published way of reading documents: our writing of it from its description."""
    kept: dict[int, np.ndarray] = {}

    def hook(index: int) -> Callable[[Any, Any, torch.Tensor], None]:
        def keep(_module: Any, _args: Any, h: torch.Tensor) -> None:
            kept[index] = h.detach().to(torch.float16).cpu().numpy()

        return keep

    for index, module in enumerate(subject.sites):
        module.register_forward_hook(hook(index))

    def read(documents: list[Rollout]) -> list[np.ndarray]:
        rows = []
        for document in documents:
            ids = torch.from_numpy(document.token_ids.astype(np.int64))[None].to(subject.device)
            with torch.no_grad():
                subject.model(input_ids=ids)
            parts = [kept[index][0] for index in range(len(subject.sites))]
            rows.append(np.concatenate(parts, axis=1))
        return rows

    return read


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Plain)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--long", action="store_true", help="4,000 to 10,000 tokens each")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)
    subject, bare = build(given.model, device, dtype)
    rng = np.random.default_rng(0)
    low, high = (4000, 10_000) if given.long else (100, 1500)
    lengths = rng.integers(low, high + 1, given.documents)
    documents = [
        Rollout(i, rng.integers(0, 4096, n).astype(np.int32), np.zeros(n, np.uint8))
        for i, n in enumerate(lengths)
    ]
    with RowReader(subject) as reader:
        columns = np.arange(subject.layout.d_in)
        capture = Capture(reader, columns, store_dtype="float16", batch_tokens=None, longest=None)
    price = 16 if device.type == "cpu" else 512
    batches = [
        [documents[i] for i in batch]
        for batch in plan_batches(lengths.tolist(), capture.batch_tokens, price)
    ]
    places = sum(max(len(d.token_ids) for d in batch) * len(batch) for batch in batches)
    print(
        f"{given.model} {given.dtype} on {device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}: {len(documents)} documents, {lengths.sum()} tokens, {len(batches)} "
        f"batches, {places / lengths.sum() - 1:.1%} padding"
    )

    def ours(batch: list[Rollout]) -> list[np.ndarray]:
        with RowReader(subject) as capture.reader:
            rows = capture.finish(capture.run(batch))
        return np.split(rows, np.cumsum([len(d.token_ids) for d in batch])[:-1])

    def alone(batch: list[Rollout]) -> None:
        ids = torch.zeros(len(batch), max(len(d.token_ids) for d in batch), dtype=torch.int64)
        for i, document in enumerate(batch):
            ids[i, : len(document.token_ids)] = torch.from_numpy(document.token_ids)
        with torch.inference_mode():
            bare(input_ids=ids.to(device), use_cache=False)

    published = published_way(subject)
    ways: dict[str, Callable[[list[Rollout]], Any]] = {
        "lorascope": ours,
        "bare": alone,
        "bare again": alone,
        "published": published,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    apart: list[float] = []
    for batch in batches[:1] + batches[-1:]:
        for way in ways.values():
            way(batch)  # warm
    order = random.Random(0)
    for _ in range(given.repeats):
        for batch in batches:
            names = list(ways)
            order.shuffle(names)
            rows: dict[str, Any] = {}
            for name in names:
                _wait(device)
                begun = time.perf_counter()
                rows[name] = ways[name](batch)
                _wait(device)
                seconds[name].append(time.perf_counter() - begun)
            for mine, theirs in zip(rows["lorascope"], rows["published"], strict=True):
                gap = np.abs(mine.astype(np.float32) - theirs.astype(np.float32))
                apart.append(float(gap.max() / np.abs(theirs).astype(np.float32).max()))
    total = int(lengths.sum()) * given.repeats
    for name, times in seconds.items():
        ratios = [t / b for t, b in zip(times, seconds["bare"], strict=True)]
        low_q, middle, high_q = statistics.quantiles(ratios, n=4)
        print(
            f"  {name:<12} {total / sum(times):>10,.0f} tokens/s   time / bare: all "
            f"{sum(times) / sum(seconds['bare']):.3f}, median {middle:.3f} "
            f"({low_q:.3f} to {high_q:.3f})"
        )
    print(f"  rows apart, lorascope and published: at most {max(apart):.1e} of the largest value")
    if device.type == "cuda":
        _print_rate(subject, total / sum(seconds["lorascope"]), device, dtype)


def _print_rate(subject: Subject, rate: float, device: torch.device, dtype: torch.dtype) -> None:
    """Print the share of the measured matmul rate, and what s1K-1.1 would take."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    for _ in range(3):
        torch.mm(a, a)
    _wait(device)
    begun = time.perf_counter()
    for _ in range(20):
        torch.mm(a, a)
    _wait(device)
    peak = 20 * 2 * 8192**3 / (time.perf_counter() - begun)
    layers = subject.causal.model.layers
    weights = sum(p.numel() for n, p in layers.named_parameters() if "base_layer.weight" in n)
    used = 2 * weights * rate
    print(
        f"  {used / 1e12:.0f} of {peak / 1e12:.0f} TFLOP/s measured for a product of 8192 "
        f"({used / peak:.0%}); 10 M tokens in {10e6 / rate / 60:.1f} minutes"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Plain(argparse.RawDescriptionHelpFormatter):
    pass


if __name__ == "__main__":
    main()
