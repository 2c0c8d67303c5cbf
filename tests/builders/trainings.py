"""Real trainings of a tiny LoRA by transformers' `Trainer`, with rows logged or not.

As a program, `python trainings.py JSON` trains with these arguments of `train`, for tests that kill
it or run it in several processes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from lorascope.callbacks import RowLogger

LENGTH = 24


class Texts(torch.utils.data.Dataset):
    """Random token ids, the same each time."""

    def __init__(self, n: int) -> None:
        ids = torch.randint(3, 300, (n, LENGTH), generator=torch.Generator().manual_seed(1))
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def peft_model(base: str, r: int = 1, **given: Any) -> Any:
    """Return a base with a fresh LoRA that has dropout, on the CPU."""
    set_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(
        r=r, lora_alpha=16, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config, **given)


def train(
    base: str,
    folder: str,
    dataset: str | None,
    *,
    steps: int = 6,
    every: int = 2,
    r: int = 1,
    resume: bool = False,
    rows: dict[str, Any] | None = None,
    model: Any = None,
    **arguments: Any,
) -> Trainer:
    """Train in `folder`, with checkpoints in it; with a `dataset`, log rows to `folder`/rows."""
    out = Path(folder)
    given = {"save_strategy": "steps", "save_steps": every, "save_only_model": False, **arguments}
    callbacks = []
    if dataset is not None:
        options = {"num_examples": 5, "store_dtype": "float32", **(rows or {})}
        callbacks.append(RowLogger(dataset, out / "rows", every=every, **options))
    trainer = Trainer(
        model=peft_model(base, r) if model is None else model,
        args=TrainingArguments(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            lr_scheduler_type="constant",  # so that a step does not depend on the number of steps
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=3,
            **given,
        ),
        train_dataset=Texts(64),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def losses(trainer: Trainer) -> list[float]:
    """Return the loss at every step."""
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    train(**json.loads(sys.argv[1]))
