"""Run `safety-experts` as an installed command, or as `python <pack>/cli.py` from any directory without installing.

In the second case this file makes its own folder importable as `safety_experts`, whatever the folder is called.
"""

import importlib.util
import sys
from pathlib import Path


def _make_importable() -> None:
    root = Path(__file__).resolve().parent
    # Python puts a script's folder first on sys.path; our nodes/ would shadow ComfyUI's nodes.py there.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]
    if "safety_experts" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(
        "safety_experts", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["safety_experts"] = module
    spec.loader.exec_module(module)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return 0 done, 1 the work failed, 2 the arguments or the input are wrong."""
    _make_importable()
    from safety_experts.commands import run

    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
