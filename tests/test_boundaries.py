"""Which room may import which (design §2), and that ComfyUI is known to nodes/ only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# room -> the rooms it may import; the files of SHARED serve everybody and import none.
MAY_IMPORT: dict[str, set[str]] = {
    "preferences": set(),
    "experts": set(),
    "models": set(),
    "toy": set(),
    "training": {"preferences", "experts", "models"},
    "guards": {"preferences", "models"},
    "evaluation": {"preferences", "experts", "models", "guards", "toy"},
    "demo": {"preferences", "experts", "models", "training", "evaluation", "toy"},
    "headless": {"preferences", "experts", "training", "evaluation", "demo"},
    "commands": {"preferences", "experts", "models", "training", "guards", "evaluation", "demo", "headless", "toy"},
    "nodes": {"preferences", "experts", "models", "training", "guards", "evaluation"},
}
SHARED = {
    "checkpoint_id",
    "devices",
    "endpoint",
    "errors",
    "files",
    "key_values",
    "plain_yaml",
    "seeding",
    "tensor_file",
    "transformers_folder",
    "typed",
}
LIBRARY_FILES = sorted(
    [ROOT / f"{name}.py" for name in ("__init__", *SHARED)]
    + [path for room in MAY_IMPORT if room != "nodes" for path in (ROOT / room).rglob("*.py")]
)
FILES = sorted([*LIBRARY_FILES, *(ROOT / "nodes").rglob("*.py")])
COMFYUI_MODULES = {"nodes", "server", "execution", "folder_paths", "node_helpers", "latent_preview", "app"}

GUARD = f"""
import sys

class NoComfyUI:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first.startswith("comfy") or first in {COMFYUI_MODULES}:
            raise ImportError(name + " is ComfyUI's; only nodes/ may import it")

sys.meta_path.insert(0, NoComfyUI())
"""


def _module_name(path: Path) -> str:
    parts = ["safety_experts", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _run_guarded(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", GUARD + code], cwd=folder, capture_output=True, text=True)


def _imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Yield the absolute name of every module imported anywhere in a file, also inside functions."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import files` names the module last, `from ..files import x` first; both may be meant.
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Return what a file of `module` imports against the rules."""
    room = module.split(".")[1] if "." in module else ""
    found = []
    for name in _imports(source, module, is_package):
        parts = name.split(".")
        if parts[0] == "safety_experts" and len(parts) > 1 and room:
            allowed = MAY_IMPORT.get(room, set()) | SHARED | {room}
            if parts[1] not in allowed and parts[1] in {*MAY_IMPORT, "cli"}:
                found.append(f"{module} imports {name}")
        elif room != "nodes" and (parts[0].startswith("comfy") or parts[0] in COMFYUI_MODULES):
            found.append(f"{module} imports ComfyUI's {name}")
    return found


def _absolute_imports_of_ourselves(source: str) -> list[int]:
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("safety_experts"))
        or (isinstance(node, ast.Import) and any(alias.name.startswith("safety_experts") for alias in node.names))
    ]


def test_every_library_room_imports_without_comfyui_and_without_a_heavy_library(tmp_path):
    names = [_module_name(path) for path in LIBRARY_FILES]
    heavy = ("diffusers", "peft", "transformers", "accelerate")
    code = f"""
import importlib
for name in {names}:
    importlib.import_module(name)
    heavy = [library for library in {heavy} if library in sys.modules]
    assert not heavy, f"{{name}} imports {{heavy}} when it is imported"
"""
    finished = _run_guarded(code, tmp_path)

    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("name", ["comfy.sd", "comfy_api.latest", "folder_paths", "server", "safety_experts.nodes"])
def test_the_guard_stops_an_import_of_comfyui(name, tmp_path):
    finished = _run_guarded(f"import importlib; importlib.import_module({name!r})", tmp_path)

    assert finished.returncode == 1
    assert "only nodes/ may import it" in finished.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_room_may(path):
    source = path.read_text(encoding="utf-8")

    assert not _violations(source, _module_name(path), path.name == "__init__.py")
    # ComfyUI loads the pack under another name, so an absolute import would find nothing, or a second copy.
    assert not _absolute_imports_of_ourselves(source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("safety_experts.experts.merging", "from ..training.lora import attach"),
        ("safety_experts.experts.merge_methods.method", "from ...training import lora"),
        ("safety_experts.preferences.pairs", "def f():\n    from .. import experts"),
        ("safety_experts.training.run", "from ..nodes import host"),
        ("safety_experts.training.run", "import comfy.utils"),
        ("safety_experts.evaluation.report", "from folder_paths import base_path"),
        ("safety_experts.nodes.host", "from ..commands import run"),
    ],
)
def test_the_walk_finds_a_forbidden_import(module, source):
    assert len(_violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("safety_experts.training.run", "from ..experts.keys import kohya_name\nfrom ..errors import InputError"),
        ("safety_experts.experts.merging", "from .. import files\nfrom . import keys\nimport torch"),
        ("safety_experts.nodes.host", "import folder_paths\nfrom ..training import trainer"),
    ],
)
def test_the_walk_lets_an_allowed_import_pass(module, source):
    assert _violations(source, module) == []
