"""ComfyUI's folders, device and progress as the library wants them; every path of a workflow is checked here."""

from .checkpoints import (
    base_checkpoint,
    checkpoint_names,
    checkpoint_path,
    clip_tokenizer_folder,
    is_diffusion_model,
    open_checkpoint,
)
from .command import end_with_the_command, told_by_command
from .datasets import dataset_folder, dataset_name, dataset_names, dataset_state
from .device import training_on_device
from .evaluations import evaluation_folder, evaluation_folders
from .experts import expert_name, expert_names, expert_path, fresh_expert_path
from .file_state import file_state
from .import_sources import import_source
from .judges import fresh_judge_path, judge_files, judge_folders, judge_path
from .messages import show_text, tell
from .own_writes import own_writes
from .progress import PatientProgress, Progress, stop_if_cancelled
from .prompt_files import UNSAFE_FILE_SUFFIXES, prompt_file, prompt_files
from .runs import Runs, memory_used, running
from .settings import blurs_unsafe
from .training_files import earlier_experts, read_losses, stopped_training, write_metrics

__all__ = [
    "UNSAFE_FILE_SUFFIXES",
    "PatientProgress",
    "Progress",
    "Runs",
    "base_checkpoint",
    "blurs_unsafe",
    "checkpoint_names",
    "checkpoint_path",
    "clip_tokenizer_folder",
    "dataset_folder",
    "dataset_name",
    "dataset_names",
    "dataset_state",
    "earlier_experts",
    "end_with_the_command",
    "evaluation_folder",
    "evaluation_folders",
    "expert_name",
    "expert_names",
    "expert_path",
    "file_state",
    "fresh_expert_path",
    "fresh_judge_path",
    "judge_files",
    "judge_folders",
    "judge_path",
    "memory_used",
    "import_source",
    "is_diffusion_model",
    "own_writes",
    "open_checkpoint",
    "prompt_file",
    "prompt_files",
    "read_losses",
    "running",
    "show_text",
    "stop_if_cancelled",
    "stopped_training",
    "tell",
    "told_by_command",
    "training_on_device",
    "write_metrics",
]
