"""The command line from any directory, installed or not, and what its exit codes and error lines promise."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each test starts a process
ROOT = Path(__file__).resolve().parents[1]
PROMPTS = "prompt,safe_prompt,category\na red circle with thorns,a red circle,violence\n"


@pytest.fixture
def run(tmp_path):
    """Run a program of ours in an otherwise empty directory."""

    def run(*command: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def _assert_one_error_line(finished: subprocess.CompletedProcess, exit_code: int, *words: str) -> None:
    assert finished.returncode == exit_code, finished.stderr
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_help_names_every_command(run):
    finished = run(ROOT / "cli.py", "--help")

    assert finished.returncode == 0, finished.stderr
    assert all(name in finished.stdout for name in ("dataset", "train", "merge", "inspect", "demo"))


def test_a_checkout_of_any_name_runs_itself_and_not_the_installed_pack(run, tmp_path):
    checkout = tmp_path / "my pack.v2"
    shutil.copytree(ROOT / "commands", checkout / "commands")
    for name in ("__init__.py", "cli.py", "errors.py", "files.py"):
        shutil.copy(ROOT / name, checkout)
    dataset = checkout / "commands" / "dataset.py"
    dataset.write_text(dataset.read_text(encoding="utf-8") + '\nHELP = "from the other checkout"\n', encoding="utf-8")

    finished = run(checkout / "cli.py", "dataset", "--help")

    assert finished.returncode == 0, finished.stderr
    assert "from the other checkout" in finished.stdout


def test_done_is_exit_code_0_and_json_on_stdout(run, prompts, tmp_path):
    finished = run(ROOT / "cli.py", "dataset", "import", prompts, "--out", tmp_path / "pairs", "--json")

    assert finished.returncode == 0, finished.stderr
    assert json.loads(finished.stdout)["prompt_pairs"] == 1


def test_a_file_where_the_folder_should_be_is_exit_code_2_and_one_line(run, prompts):
    _assert_one_error_line(
        run(ROOT / "cli.py", "dataset", "import", prompts, "--out", prompts / "in"), 2, "prompts.csv"
    )


def test_wrong_input_is_exit_code_2_and_one_line(run):
    _assert_one_error_line(run(ROOT / "cli.py", "inspect", "absent.safetensors"), 2, "absent.safetensors")


def test_wrong_arguments_are_exit_code_2(run):
    finished = run(ROOT / "cli.py", "train", "--dataset", "pairs")

    assert finished.returncode == 2
    assert "--model" in finished.stderr
