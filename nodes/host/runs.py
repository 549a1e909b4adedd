"""The trainings in `output/loras`, those that run now among them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import folder_paths
import torch
from server import PromptServer

from ...errors import InputError
from ...files import path_inside
from ...training.watching.recorder import RunRecorder
from ...training.watching.run_files import Memory

EVENT = "safety_experts.run"
_MIB = 1 << 20
_active: dict[str, RunRecorder] = {}


def _root() -> Path:
    return Path(folder_paths.get_output_directory()) / "loras"


class Runs:
    """`training.watching.routes.Runs` of this server; a run is called as its expert, without the suffix."""

    def names(self) -> list[str]:
        found = [(path.stat().st_mtime, path.parent) for path in _root().rglob("*.run/run.json")]
        newest = [folder.with_suffix("") for _, folder in sorted(found, reverse=True)]
        return [folder.relative_to(_root()).as_posix() for folder in newest]

    def expert(self, name: str) -> Path:
        if not name.strip("./"):
            raise InputError("a training has a name")
        path = path_inside(_root(), f"{name}.safetensors")
        return path

    def active(self, name: str) -> RunRecorder | None:
        return _active.get(name)


@contextlib.contextmanager
def running(recorder: RunRecorder, node_id: str) -> Iterator[None]:
    """Inside, the training can be asked for something; open pages are told that it begins."""
    name = recorder.expert.relative_to(_root()).with_suffix("").as_posix()
    _active[name] = recorder
    server = vars(PromptServer)["instance"]
    server.send_sync(EVENT, {"node": node_id, "run": name})
    try:
        yield
    finally:
        del _active[name]


def memory_used() -> Memory | None:
    """Return what the training's device, or on a CPU this process, uses now."""
    device = comfy.model_management.get_torch_device()
    if device.type == "cuda":
        used, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return Memory(device=torch.cuda.get_device_name(device), used=used / _MIB, peak=peak / _MIB)
    import psutil

    return Memory(device=device.type, used=psutil.Process().memory_info().rss / _MIB)
