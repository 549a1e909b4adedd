"""A ComfyUI started for one workflow, in a folder beside what the command writes."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..demo.comfyui import ComfyServer
from ..demo.comfyui_messages import InterruptedWorkflowError
from ..errors import InputError, SafetyExpertsError
from ..files import write_atomically
from .graphs import Graph

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]  # done, total
MESSAGE_EVENT = "safety_experts.message"  # nodes/host/messages.py
_COMMAND_VARIABLE, _COMMAND_FILE = "SAFETY_EXPERTS_COMMAND", "command.json"  # nodes/host/command.py
_shared: list[ComfyServer] = []


@dataclass(frozen=True)
class Comfy:
    """Which ComfyUI to run, and how to talk to the user meanwhile.

    Args:
        folder: of ComfyUI's main.py; its Python packages must be installed in this Python.
        cpu: None: only where there is no CUDA device.
        should_stop: asked again and again; the workflow is cancelled when it says so.
    """

    folder: Path
    cpu: bool | None = None
    on_progress: OnProgress = field(default=lambda done, total: None)
    should_stop: Callable[[], bool] = field(default=lambda: False)


def work_folder(out: Path) -> Path:
    """Return where the server of the command that writes `out` has its base directory."""
    if _shared:
        return _shared[-1].base_directory
    return out.absolute().parent / f".{out.stem}.comfyui"


@contextlib.contextmanager
def one_comfyui(comfy: Comfy, work: Path) -> Iterator[None]:
    """Inside, all commands of this process use one ComfyUI, whose start is most of a short command's time."""
    with _server(comfy, work, {}) as server:
        _shared.append(server)
        try:
            yield
        finally:
            _shared.remove(server)


def run_graph(
    comfy: Comfy, work: Path, build: Callable[[ComfyServer], tuple[Graph, str]], paths: Mapping[str, Path]
) -> bool:
    """Start the server, run the workflow, stop the server; return False where it was cancelled because asked to.

    Args:
        work: the server's base directory; kept, with what the workflow wrote there.
        build: returns the workflow and the node whose progress is shown.
        paths: what nodes are told that no workflow can name (nodes/host/command.py).

    Raises:
        InputError: a node refuses its input, in its own words.
        SafetyExpertsError: ComfyUI or a node failed; the log is kept.
    """

    def hear(event: str, data: dict[str, Any]) -> None:
        if event == MESSAGE_EVENT and data.get("severity") == "warn" and not comfy.should_stop():
            logger.warning("%s", data["text"])

    if _shared:
        _tell(work, paths)
    with contextlib.nullcontext(_shared[-1]) if _shared else _server(comfy, work, paths) as server:
        graph, node = build(server)
        try:
            server.run(
                graph,
                timeout_seconds=float("inf"),
                on_progress=lambda node_id, done, total: comfy.on_progress(done, total) if node_id == node else None,
                on_event=hear,
                should_stop=comfy.should_stop,
            )
        except InterruptedWorkflowError:
            if comfy.should_stop():
                return False
            raise
        except InputError:
            raise
        except SafetyExpertsError as error:
            text = str(error)
            raise SafetyExpertsError(
                text if str(server.log_path) in text else f"{text}; ComfyUI's log is {server.log_path}"
            ) from error
        return True


def _server(comfy: Comfy, work: Path, paths: Mapping[str, Path]) -> ComfyServer:
    told = {_COMMAND_VARIABLE: str(_tell(work, paths))}
    return ComfyServer(work, comfyui=comfy.folder, cpu=comfy.cpu, environment=told)


def _tell(work: Path, paths: Mapping[str, Path]) -> Path:
    file = work / _COMMAND_FILE
    with write_atomically(file) as temporary:
        temporary.write_text(json.dumps({name: str(path) for name, path in paths.items()}), encoding="utf-8")
    return file


@contextlib.contextmanager
def tidied(work: Path) -> Iterator[None]:
    """Afterwards a server's base directory is gone, but for the log of a failure that is not of the input."""
    failed = True
    try:
        yield
        failed = False
    except InputError:
        failed = False
        raise
    finally:
        tidy(work, keep_log=failed)


def tidy(work: Path, *, keep_log: bool) -> None:
    """Remove a server's base directory, but for its log where somebody is told to read it."""
    log = work / "comfyui.log"
    if _shared:  # it goes on
        shutil.rmtree(work / "output", ignore_errors=True)
        return
    for path in work.iterdir() if work.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif not (keep_log and path == log):
            path.unlink(missing_ok=True)
    if not keep_log:
        shutil.rmtree(work, ignore_errors=True)
