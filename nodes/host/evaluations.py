"""Where evaluations made in the graph lie: in ComfyUI's user folder, where no request of its own reaches them."""

from pathlib import Path

import folder_paths

from ...errors import InputError
from ...files import path_inside
from .command import told_by_command


def evaluation_folder(name: str) -> Path:
    """Return the folder of an evaluation, whether or not it is there.

    Raises:
        InputError: the name is empty or leaves the folder of evaluations.
    """
    if (given := told_by_command("evaluation")) and name == given.name:
        return given
    root = Path(folder_paths.get_system_user_directory("safety_experts")) / "evaluations"
    folder = path_inside(root, name.strip())
    if folder == root.resolve():
        raise InputError("evaluation_name is empty: give the evaluation a name such as my_evaluation")
    return folder


def evaluation_folders() -> list[Path]:
    """Return the folders of finished evaluations, the newest first."""
    root = Path(folder_paths.get_system_user_directory("safety_experts")) / "evaluations"
    reports = sorted(root.glob("*/report.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    return [report.parent for report in reports]
