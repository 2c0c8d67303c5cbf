"""Look at a LoRA while transformers' `Trainer` trains it, without any effect on the training.

At the start, at every `every`-th step and at the end:

1. The process of rank 0 takes the PEFT model out of what wraps it (DDP, `torch.compile`). The
   others go on, and wait for it at their next exchange of gradients.
2. Every module goes to eval mode: no dropout, no gradient checkpointing. Mixed precision wraps the
   outermost forward only, which is not called: rows are computed in the dtype of the weights.
3. `record` gets the model as a `Subject`.
4. Every module gets back the mode that it had, and the random generators their states.
"""

import hashlib
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import TrainerCallback

from lorascope.errors import AdapterError, LorascopeError
from lorascope.subject.adapter import Adapter, unsupported_reason
from lorascope.subject.base import Base, digest_base
from lorascope.subject.load import Subject, find_sites

log = logging.getLogger(__name__)

_WRAPPERS = ("module", "_orig_mod")  # of DDP and the like, and of torch.compile


class StepCallback(TrainerCallback):
    """Calls `prepare` once and `record` at steps of a training; a base class for what logs them.

    A failure of `prepare` ends the training before it begins. One of `record` is logged as a
    warning, and the training goes on.
    """

    def __init__(self, every: int, tokenizer: Any, gauge: str, *, skip_unhookable: bool) -> None:
        self.every, self.tokenizer = every, tokenizer
        self.gauge, self.skip_unhookable = gauge, skip_unhookable
        self._last: int | None = None  # step that was recorded

    def prepare(self, subject: Subject, *, is_resumed: bool) -> None:
        """Get ready for a training with the model as it is at its first step."""
        raise NotImplementedError

    def record(self, subject: Subject, step: int) -> None:
        """Record the model after `step` steps."""
        raise NotImplementedError

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Record the model as it is before the first step, or after the step that was resumed."""
        if not state.is_world_process_zero:
            return
        self.tokenizer = self.tokenizer or given.get("processing_class")
        if self.tokenizer is None:
            raise AdapterError("the Trainer has no tokenizer; give one as tokenizer=...")
        with self._subject(model) as subject:
            self.prepare(subject, is_resumed=state.global_step > 0)
        self._record(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Record the model at every `every`-th step."""
        if state.global_step % self.every == 0:
            self._record(model, state)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        """Record the model as the training leaves it, unless that was done already."""
        self._record(model, state)

    def _record(self, model: Any, state: Any) -> None:
        step = int(state.global_step)
        if not state.is_world_process_zero or step == self._last:
            return
        self._last = step
        try:
            with self._subject(model) as subject:
                self.record(subject, step)
        except (LorascopeError, OSError) as error:
            log.warning("step %d is not recorded: %s", step, error)

    @contextmanager
    def _subject(self, model: Any) -> Generator[Subject]:
        """Yield the model as a subject in eval mode; then put it and the generators back."""
        peft_model = unwrapped(model)
        training = {module: module.training for module in peft_model.modules()}
        devices = sorted({p.device.index for p in peft_model.parameters() if p.is_cuda})
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                peft_model.eval()
                yield live_subject(
                    peft_model, self.tokenizer, self.gauge, skip_unhookable=self.skip_unhookable
                )
        finally:
            for module, mode in training.items():
                module.training = mode


def unwrapped(model: Any) -> PeftModel:
    """Return the PEFT model inside of what a trainer wraps it in.

    Raises AdapterError if there is none, or if its weights are spread over processes.
    """
    while not isinstance(model, PeftModel):
        inside = vars(model).get("_modules", {})
        inner = next((inside[name] for name in _WRAPPERS if name in inside), None)
        if inner is None:
            raise AdapterError(
                f"the model that is trained is a {type(model).__name__}, expected a PEFT model "
                "with a LoRA; give the Trainer what get_peft_model returned"
            )
        model = inner
    spread = [
        name
        for name, parameter in model.named_parameters()
        if not parameter.numel() or hasattr(parameter, "placements")
    ]
    if spread:
        raise AdapterError(
            f"the weights are spread over processes (such as {spread[0]}): rows cannot be read "
            "while FSDP or ZeRO-3 trains; run lorascope generate on saved checkpoints"
        )
    return model


def live_subject(model: PeftModel, tokenizer: Any, gauge: str, *, skip_unhookable: bool) -> Subject:
    """Return a PEFT model that is in memory, in eval mode, as a subject.

    Its layout names no adapter, because no file has these weights, and those of several steps have
    the same columns: one SAE reads the rows of all.
    """
    name = str(model.active_adapter)
    config = model.peft_config[name].to_dict()
    if reason := unsupported_reason(config):
        raise AdapterError(f"adapter {name} has no rows to read: {reason}")
    tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    adapter = Adapter(
        path=Path(),
        name=name,
        config=config,
        shapes={key: tuple(tensor.shape) for key, tensor in tensors.items()},
        digest=_digest_tensors(tensors),
    )
    causal = model.get_submodule("base_model.model")
    source = Path(str(getattr(causal.config, "_name_or_path", "")) or "model")
    is_here = (source / "config.json").is_file()
    base = Base(
        source.name if is_here else str(source), source, digest_base(source) if is_here else ""
    )
    quantizer = getattr(causal, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    subject = find_sites(
        model,
        tokenizer,
        adapter,
        base,
        gauge,
        skip_unhookable,
        None if method is None else str(getattr(method, "value", method)),
    )
    return replace(subject, layout=replace(subject.layout, adapter=None))


def _digest_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
