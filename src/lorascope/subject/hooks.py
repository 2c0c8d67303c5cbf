"""Read `h = A·x` where PEFT computes it: at the output of every `lora_A` module."""

from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lorascope.errors import AdapterError
from lorascope.subject.load import Subject


class RowReader:
    """A context in which `read` runs the subject and returns the rows of a batch.

    The hooks are removed on leaving, also when a forward raised.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._handles: list[Any] = []
        self._fired = [0] * len(subject.sites)
        self._rows: Tensor | None = None
        self._inside = False

    def __enter__(self) -> "RowReader":
        start = 0
        for index, (site, module) in enumerate(
            zip(self.subject.layout.sites, self.subject.sites, strict=True)
        ):
            columns = slice(start, start + site.rank)
            self._handles.append(module.register_forward_hook(self._hook(index, columns)))
            start += site.rank
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, index: int, columns: slice) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
            assert self._rows is not None, "a forward outside of read()"
            self._fired[index] += 1
            self._rows[..., columns] = output

        return keep

    def read(
        self, token_ids: Int[Tensor, "batch seq"], mask: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_in"]:
        """Run one right-padded batch and return every row in float32; padded places are garbage.

        `mask` is 1 at tokens and 0 at padding, which must come last so that a token's position is
        its index. Raises AdapterError unless each site ran exactly once.
        """
        if not bool((mask[:, :-1] >= mask[:, 1:]).all()):
            raise ValueError("padding must come after the tokens")
        shape = (*token_ids.shape, self.subject.layout.d_in)
        self._rows = torch.empty(shape, dtype=torch.float32, device=self.subject.device)
        self._fired = [0] * len(self._fired)
        self.subject.backbone(input_ids=token_ids, attention_mask=mask, use_cache=False)
        for site, count in zip(self.subject.layout.sites, self._fired, strict=True):
            if count != 1:
                raise AdapterError(
                    f"lora_A of {site.module} ran {count} times in one forward, expected once"
                )
        rows, self._rows = self._rows, None
        return rows
