"""Training in several processes, started by torchrun and followed from here: what a graph does to use several GPUs."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from ..errors import InputError, SafetyExpertsError
from ..experts.expert_file import load_expert
from ..models.checkpoint import Checkpoint
from ..preferences.dataset import PreferenceDataset
from ..training.event_lines import follow_line
from ..training.events import TrainingEvents
from ..training.processes import Processes
from ..training.recipe import Recipe
from ..training.trainer import TrainingStoppedError, TrainResult
from .host import clip_tokenizer_folder

_COMMAND_LINE = Path(__file__).resolve().parents[1] / "cli.py"
_POLL_SECONDS = 0.2


def train_in_processes(
    num_processes: int,
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    recipe: Recipe,
    out_path: str | Path,
    *,
    events: TrainingEvents,
    category: str | None,
    device: torch.device,
    resume: bool,
) -> TrainResult:
    """Do what `training.trainer.train_expert` does with this machine's first GPUs, or with processes on the CPU.

    Args:
        device: "cpu" uses no GPU; any other has one for each process.

    Raises:
        InputError: there are fewer GPUs, or batches cannot be shared.
        SafetyExpertsError: a process failed; the message is its own.
        TrainingStoppedError: stopped before the first step.
    """
    Processes(0, num_processes).check(recipe)
    if device.type == "cuda" and num_processes > torch.cuda.device_count():
        raise InputError(
            f"{num_processes} processes need as many GPUs, there are {torch.cuda.device_count()}; use fewer"
        )
    with tempfile.TemporaryDirectory(prefix="safety-experts-") as scratch:
        recipe_path = Path(scratch) / "recipe.yaml"
        recipe_path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
        files = {"--model": checkpoint.path, "--dataset": dataset.folder, "--out": out_path, "--recipe": recipe_path}
        files |= {"--tokenizer": clip_tokenizer_folder()}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
        command += [str(_COMMAND_LINE), "train", "--json-lines", "--overwrite"]
        command += [word for option, path in files.items() for word in (option, str(Path(path).resolve()))]
        command += ["--category", category] if category else []
        command += ["--resume"] if resume else []
        every = events.sample_every
        command += ["--samples", scratch, "--sample-every", str(every)] if every else []
        # The folder is one without modules, which `-m` would put first on sys.path.
        with _started(command, Path(scratch), device) as (process, errors):
            done = _follow(process, events)
            if done is None:
                raise _failure(errors, events.should_stop())
    path = Path(out_path)
    return TrainResult(load_expert(path), path, done["records"], done["step"], done["stopped"])


@contextlib.contextmanager
def _started(command: list[str], folder: Path, device: torch.device) -> Iterator[tuple[subprocess.Popen, Path]]:
    """Yield the running launcher and the file its errors go to; end it however the block ends."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    errors = folder / "errors.txt"
    with open(errors, "wb") as error_file:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=error_file, text=True, encoding="utf-8"
        )
        try:
            yield process, errors
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()


def _follow(process: subprocess.Popen, events: TrainingEvents) -> dict | None:
    """Hand on what the processes print; return what they said at the end, or None when they failed."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    asked = False
    done: dict | None = None
    while True:
        if events.should_stop() and not asked:
            asked = True
            # Windows cannot interrupt another process: there the last saved state is what remains.
            process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        try:
            line = lines.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if line is None:
            process.wait()
            return done
        done = follow_line(line, events) or done


def _failure(errors: Path, was_stopped: bool) -> SafetyExpertsError:
    lines = [line.strip() for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if was_stopped:
        return TrainingStoppedError(ours[0] if ours else "stopped before the first training step; nothing was saved")
    others = [line for line in lines if "Error" in line] or lines or ["they ended without a word"]
    return SafetyExpertsError(ours[0] if ours else f"the training processes failed: {others[-1]}")
