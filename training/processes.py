"""Several processes, one run: each takes its rows of every batch, and gradients are averaged.

Every process draws the whole batch (draws are a function of seed and step), so the result is that of one process with
the same global batch, up to the order of floating-point sums.
"""

import contextlib
import datetime
from collections.abc import Iterable
from dataclasses import fields, replace

import torch
from torch import Tensor, distributed

from ..errors import InputError
from .batches import Batch
from .recipe import Recipe

_LONGEST_WAIT = datetime.timedelta(days=1)


class Processes:
    """This process among those accelerate or torchrun started; one alone when there are none.

    Args:
        rank: this process, from 0.
        count: how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1):
        self.rank, self.count = rank, count

    @classmethod
    def from_launcher(cls) -> tuple["Processes", torch.device]:
        """Return this process and the device accelerate gives it: CUDA, XPU, MPS, … or the CPU.

        Started by `accelerate launch` or `torchrun`; CPU processes by `torchrun`, since accelerate starts only one.
        """
        from accelerate import PartialState  # accelerate, diffusers and peft take seconds to import

        # The others wait while the first encodes the dataset, which may take longer than the usual ten minutes.
        state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
        return cls(state.process_index, state.num_processes), state.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def check(self, recipe: Recipe) -> None:
        """Raise InputError unless every batch can be shared out evenly."""
        if recipe.batch_size % self.count:
            raise InputError(
                f"batch_size {recipe.batch_size} cannot be shared by {self.count} processes; use a multiple of it "
                "(batch_size counts the pairs of all processes together)"
            )

    @contextlib.contextmanager
    def main_first(self):
        """Inside, the main process goes first and the others follow, so that they find its files."""
        if not self.is_main:
            distributed.barrier()
        yield
        if self.is_main and self.count > 1:
            distributed.barrier()

    def share(self, batch: Batch) -> Batch:
        """Return this process's rows of a batch."""
        if self.count == 1:
            return batch
        rows = len(batch.chosen) // self.count
        part = slice(self.rank * rows, (self.rank + 1) * rows)
        return replace(batch, **{item.name: getattr(batch, item.name)[part] for item in fields(Batch)})

    def any(self, answer: bool, device: torch.device) -> bool:
        """Return whether any process answers yes, so that all stop at the same place."""
        if self.count == 1:
            return answer
        answers = torch.tensor(int(answer), device=device)
        distributed.all_reduce(answers)
        return bool(answers)

    def mean(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Return each value's mean over the processes."""
        if self.count == 1:
            return values
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        distributed.all_reduce(total)
        return dict(zip(values, (total / self.count).tolist(), strict=True))

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.count
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
