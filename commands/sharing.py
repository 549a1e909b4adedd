"""This process among those that accelerate or torchrun started for one command."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def this_process(device: str | None) -> "tuple[int, int, torch.device]":
    """Return rank, number of processes and device, as accelerate or torchrun gave them."""
    import torch

    from ..devices import choose_device

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and device:
        return 0, 1, choose_device(device)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.accelerator.is_available())
    return state.process_index, state.num_processes, choose_device(device) if device else state.device


def wait_for_all() -> None:
    """Return when every process has called this."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
