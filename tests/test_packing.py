"""What `comfy node pack` puts into the zip that people install, by its own rule: tracked files less .comfyignore."""

import re
import subprocess
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ["__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md", "cli.py"]
FOLDERS = {
    "commands", "demo", "docs", "evaluation", "example_workflows", "experts", "guards", "headless", "locales", "models",
    "nodes", "preferences", "subgraphs", "toy", "training", "web",
}  # fmt: skip


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name.decode("utf-8", errors="replace") for name in listed.stdout.split(b"\0") if name]


@pytest.fixture(scope="module")
def packed(tracked) -> list[str]:
    """Names in the zip: comfy-cli reads .comfyignore as git reads .gitignore."""
    excluded = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore"], cwd=ROOT, capture_output=True
    ).stdout.split(b"\0")
    return sorted(set(tracked) - {name.decode("utf-8", errors="replace") for name in excluded})


def test_the_zip_holds_what_the_pack_needs_and_nothing_for_its_makers(packed):
    assert set(NEEDED) <= set(packed)
    assert {name.split("/")[0] for name in packed if "/" in name} <= FOLDERS
    assert not [
        name for name in packed if re.search(r"(^|/)(tests|benchmarks|__pycache__)/|\.pyc$|^docs/.*\.png$", name)
    ]


def test_every_name_can_be_unpacked_on_every_system(tracked):
    """A test that wrote into its working folder left names such as C:\\x here once."""
    assert [name for name in tracked if not re.fullmatch(r"[A-Za-z0-9_.@+ -]+(/[A-Za-z0-9_.@+ -]+)*", name)] == []


def test_the_version_is_the_changelog_s_newest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == project["version"] and all(re.fullmatch(r"\d+\.\d+\.\d+", heading) for heading in released)


def test_requirements_are_the_projects_own_less_torch():
    """ComfyUI-Manager installs requirements.txt line by line; pip and the registry read pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert sorted([*lines, "torch"]) == sorted(project["dependencies"])
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+(>=[0-9.]+)?", line) for line in lines)
