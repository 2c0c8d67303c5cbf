"""Measure which column scale (`--normalize`) gives the best dictionary.

    python benchmarks/units.py planted                   # scales of columns spread over 10^4
    python benchmarks/units.py subject --problems 1000   # the shipped model, by spliced KL

`planted`: the held-out FVU with each of the four scales, and the share of the known directions with
an absolute cosine > 0.9, with columns at variance 1 as in `train.py`.

`subject`: the command trains an SAE on the shipped model's rows. Then the model reads new problems
twice; the second time, every `lora_A` returns what the SAE makes of the rows of the first pass,
with its threshold. KL divergence of the next-token distributions from those of the adapted model,
in nats per token: `spliced`; `mean` with every column at its mean; `zero` without the adapter.
`kept` is 1 - spliced / zero. Rows of special tokens stay as they are; KL counts every token.
"""

import argparse
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import contenders
import torch
from contenders import Setting
from planted_rows import column_deviation
from torch import Tensor
from train import measure, prepare

import lorascope
from lorascope import GenerateConfig, TrainConfig
from lorascope.activations.store import ActivationStore
from lorascope.activations.work_units import load_corpus
from lorascope.sae.model import SAE, load_sae
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.hooks import RowReader
from lorascope.subject.load import Subject, find_base, load_subject, load_tokenizer
from lorascope.texts.roles import ROLES

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_problems import write_jsonl

UNITS = ("effect", "std", "rms", "none")
SUBJECT = Path(lorascope.__file__).parent / "demo" / "subject"


class Text(NamedTuple):
    """A text to read: its tokens `(1, n)`, and which of them an SAE may be trained on `(n,)`."""

    ids: Tensor
    eligible: Tensor


def planted(given: Namespace) -> None:
    """Train in each unit on rows whose columns have scales over `10^spread`."""
    data = prepare(given, given.tokens)
    deviation = column_deviation(data.train)
    factors = {
        "std": 1 / deviation,
        "rms": 1 / data.train.double().square().mean(0).sqrt(),
        "none": torch.ones(given.d_in, dtype=torch.float64),
    }
    s = Setting(
        d_sae=given.latents,
        k=given.k,
        batch=given.batch,
        n_steps=given.tokens // given.batch,
        lr=None,
    )
    print("  units   FVU (variance 1)   never fired   directions found")
    for units, factor in factors.items():
        scale = factor / (factor * deviation).square().mean().sqrt()  # as column_scale does
        run = contenders.lorascope(data.train, s, scale)
        for rows in data.order[: s.n_steps * s.batch].split(s.batch):
            run.step(data.train[rows])
        found = measure(run.finish(), data, given)
        print(
            f"  {units:<6} {found['fvu']:>17.4f} {found['never_fired']:>13.3f} "
            f"{found['found']:>18.3f}",
            flush=True,
        )


def subject(given: Namespace) -> None:
    """Train in each unit on the shipped subject's rows, and splice."""
    adapter = inspect_adapter(str(SUBJECT / "adapter"))
    base = find_base(adapter, None)
    tokenizer = load_tokenizer(adapter, base)
    subject = load_subject(adapter, base, tokenizer, torch.device("cpu"), "auto")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_jsonl(folder / "train.jsonl", given.problems, "demo")
        write_jsonl(folder / "other.jsonl", given.held_problems, "eval")
        reading = GenerateConfig(
            lora_path=str(SUBJECT / "adapter"),
            dataset=str(folder / "train.jsonl"),
            num_examples=given.problems,
            output=folder / "store",
        )
        store = ActivationStore.open(lorascope.generate(reading))
        texts = [
            Text(
                torch.tensor(rollout.token_ids)[None],
                torch.tensor(rollout.roles) != ROLES.index("special"),
            )
            for rollout in load_corpus(
                GenerateConfig(
                    lora_path=str(SUBJECT / "adapter"),
                    dataset=str(folder / "other.jsonl"),
                    num_examples=given.held_problems,
                ),
                subject.tokenizer,
            )[0]
        ]
        mean = torch.tensor(store.rows(0, store.n_rows)).float().mean(0)
        with torch.inference_mode():
            zero = divergence(subject, texts, torch.zeros_like)
            average = divergence(subject, texts, mean.expand_as)
            print(f"{len(texts)} texts, KL of zero {zero:.4f}, of the mean {average:.4f} nats")
            print("  units   spliced KL (seeds)                kept    FVU std / effect / raw")
            for units in UNITS:
                values, report = [], {}
                for seed in range(given.seeds):
                    path = lorascope.train(
                        TrainConfig(
                            data_dir=store.path,
                            output=folder / f"{units}{seed}.pt",
                            expansion_factor=given.expansion_factor,
                            k=given.k,
                            normalize=units,
                            seed=seed,
                        )
                    )
                    sae = load_sae(path)
                    report = sae.manifest["content"]["report"]
                    values.append(divergence(subject, texts, through(sae)))
                kl = statistics.mean(values)
                print(
                    f"  {units:<6} {kl:.4f} ({', '.join(f'{v:.4f}' for v in values)}) "
                    f"{1 - kl / zero:>8.3f}    {report['fvu']:.4f} (own) / "
                    f"{report['fvu_effect']:.4f} / {report['fvu_raw']:.4f}",
                    flush=True,
                )


def through(sae: SAE) -> Callable[[Tensor], Tensor]:
    """Return the function that sends rows through an SAE."""
    return lambda rows: sae.decode(sae.encode(rows))


def divergence(subject: Subject, texts: list[Text], change: Callable[[Tensor], Tensor]) -> float:
    """Return the mean KL divergence of the spliced model from the adapted one, in nats a token."""
    total, n_tokens = 0.0, 0
    with RowReader(subject, own_forward=False) as reader:
        rows = [reader.read(text.ids)[0] for text in texts]
    for text, here in zip(texts, rows, strict=True):
        true = subject.causal(input_ids=text.ids).logits[0].double().log_softmax(-1)
        with spliced(subject, torch.where(text.eligible[:, None], change(here), here)):
            other = subject.causal(input_ids=text.ids).logits[0].double().log_softmax(-1)
        total += float((true.exp() * (true - other)).sum())
        n_tokens += text.ids.numel()
    return total / n_tokens


@contextmanager
def spliced(subject: Subject, rows: Tensor) -> Iterator[None]:
    """Let every `lora_A` give its columns of `rows`; raw gauge only."""
    handles, first = [], 0
    for site, module, mix in zip(subject.layout.sites, subject.sites, subject.mixes, strict=True):
        assert mix is None, "the shipped subject has rank 1"
        part = rows[None, :, first : first + site.rank]
        first += site.rank
        handles.append(module.register_forward_hook(lambda _m, _a, h, part=part: part.to(h)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    """Read the options and run a mode."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["planted", "subject"])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--d-in", type=int, default=448)
    parser.add_argument("--latents", type=int, default=7168)
    parser.add_argument("--k", type=float, help="latents at a token (default: 50 and 8)")
    parser.add_argument("--spread", type=float, default=4.0, help="in powers of 10")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--held-problems", type=int, default=100)
    parser.add_argument("--expansion-factor", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.held_out, given.directions, given.active, given.seed = 32_768, 2000, 30.0, 0
    given.raw, given.device = True, "cpu"
    if given.mode == "planted":
        given.k = int(given.k or 50)
        planted(given)
    else:
        given.k = given.k or 8.0
        subject(given)


if __name__ == "__main__":
    main()
