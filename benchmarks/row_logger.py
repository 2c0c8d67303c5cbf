"""Measure what `RowLogger` takes of a training, and that the training is the same with it.

    python benchmarks/row_logger.py [--steps 100] [--every 50] [--texts 16] [--rounds 3]

Trains a rank-1 LoRA on the demo's base model with transformers' `Trainer`, with and without the
logger in turn. Prints a line for each run, and the share of the time that the logger takes: what
was spent in it, and how much longer whole runs are, both in seconds of the processor, medians over
the rounds. Losses must agree to the bit.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from lorascope.callbacks import RowLogger
from lorascope.demo.demo import PROBLEMS, SUBJECT
from lorascope.texts.rollouts import load_rollouts

BASE = str(SUBJECT / "base")
_BATCH = 8


class Timed(RowLogger):
    """A logger that counts its seconds."""

    seconds = 0.0

    def on_train_begin(self, *events: Any, **given: Any) -> None:
        """Count reading and tokenising the texts too."""
        begun = time.process_time()
        super().on_train_begin(*events, **given)
        self.seconds += time.process_time() - begun

    def on_step_end(self, *events: Any, **given: Any) -> None:
        """Count the recorded steps."""
        begun = time.process_time()
        super().on_step_end(*events, **given)
        self.seconds += time.process_time() - begun


def trained(texts: list[dict[str, Any]], steps: int, logger: Timed | None) -> Trainer:
    set_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(BASE),
        LoraConfig(r=1, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=_BATCH,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=texts,  # pyright: ignore[reportArgumentType]  # a list is one
            processing_class=tokenizer,
            data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[] if logger is None else [logger],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in (("steps", 100), ("every", 50), ("texts", 16), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rollouts, _ = load_rollouts(
        dataset=str(PROBLEMS), split="train", limit=1000, template="auto", tokenizer=tokenizer
    )
    texts = [{"input_ids": rollout.token_ids.tolist()} for rollout in rollouts]
    whole: dict[str, list[float]] = {"without": [], "with": []}
    inside: list[float] = []
    losses: dict[str, list[Any]] = {}
    length = statistics.mean(len(text["input_ids"]) for text in texts)
    print(
        f"{flags.steps} steps of {_BATCH} texts ({length:.0f} tokens on average), {flags.texts} "
        f"texts logged every {flags.every} steps; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    for _ in range(flags.rounds):
        for name, times in whole.items():
            with tempfile.TemporaryDirectory() as folder:
                logger = None
                if name == "with":
                    options = {"every": flags.every, "num_examples": flags.texts}
                    logger = Timed(PROBLEMS, Path(folder, "rows"), **options)
                begun, cpu = time.perf_counter(), time.process_time()
                trainer = trained(texts, flags.steps, logger)
                wall = time.perf_counter() - begun
                times.append(time.process_time() - cpu)
                spent = 0.0 if logger is None else logger.seconds
            losses[name] = [one["loss"] for one in trainer.state.log_history if "loss" in one]
            if logger is not None:
                inside.append(spent / (times[-1] - spent))
            print(
                f"{name:8} {times[-1]:7.2f} s of the processor, in the logger {spent:5.2f}; "
                f"{wall:7.2f} s on the clock",
                flush=True,
            )
    without, with_ = (statistics.median(times) for times in whole.values())
    print(f"in the logger: {statistics.median(inside):.2%} of the rest of the training")
    print(f"whole runs: {with_ / without - 1:+.2%}")
    print("losses agree to the bit" if losses["with"] == losses["without"] else "LOSSES DIFFER")


if __name__ == "__main__":
    main()
