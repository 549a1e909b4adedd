"""How much the pack adds to ComfyUI's start: the time that ComfyUI's own loader takes for it, and what it imports.

Also how much JavaScript the browser loads with the page, and how much only when a panel or a card is opened.

Each measurement is a fresh process that has loaded ComfyUI and its built-in nodes, as the server has by then. Bytecode
is cached, as Python does unless PYTHONDONTWRITEBYTECODE says otherwise; the first start after an install, which
compiles every file, is told apart.
"""

import argparse
import asyncio
import datetime
import gzip
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "import_time.json"
REPEATS = 7


def main() -> None:
    """Measure, print and write the result; `--probe` is one measurement in this process, as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probe", action="store_true", help="measure once in this process and print JSON")
    if parser.parse_args().probe:
        print(json.dumps(asyncio.run(measure())))
        return
    command = [sys.executable, __file__, "--probe"]
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        outputs = [
            subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
            for _ in range(REPEATS + 1)
        ]
    first, *probes = (json.loads(output.splitlines()[-1]) for output in outputs)
    seconds = [probe["seconds"] for probe in probes]
    result = {
        "claim": "loading the pack adds at most 0.3 s to ComfyUI's start",
        "median_seconds": round(statistics.median(seconds), 3),
        "max_seconds": round(max(seconds), 3),
        "median_cpu_seconds": round(statistics.median(probe["cpu_seconds"] for probe in probes), 3),
        "first_start_cpu_seconds": round(first["cpu_seconds"], 3),
        "javascript": javascript_bytes(),
        "num_repeats": REPEATS,
        "new_libraries": probes[0]["new_libraries"],
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            "comfyui": probes[0]["comfyui"],
            "safety-experts": importlib.metadata.version("safety-experts"),
            "torch": importlib.metadata.version("torch"),
        },
        "date": datetime.date.today().isoformat(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


def javascript_bytes() -> dict[str, int | str]:
    """Return the gzipped sizes of what ComfyUI loads with the page (every .js) and of the rest of web/."""

    def size(*suffixes: str) -> int:
        files = [path for path in (ROOT / "web").rglob("*") if path.suffix in suffixes]
        return sum(len(gzip.compress(path.read_bytes(), 9)) for path in files)

    claim = "at most 60 KB gzipped with the page, the rest lazily"
    return {"claim": claim, "page_load_bytes": size(".js"), "lazy_bytes": size(".mjs", ".css", ".html")}


async def measure() -> dict:
    """Load ComfyUI without its server, then the pack; return how long the pack took and which libraries it imported."""
    from safety_experts.demo.comfyui import find_comfyui

    sys.path.insert(0, str(find_comfyui()))
    with tempfile.TemporaryDirectory() as base_directory:
        sys.argv[1:] = ["--cpu", "--disable-api-nodes", "--base-directory", base_directory]
        import comfy.options

        comfy.options.enable_args_parsing()  # before anything else of ComfyUI is imported
        import comfyui_version

        import nodes

        await nodes.init_public_apis()
        await nodes.init_builtin_extra_nodes()
        before = set(sys.modules)
        start, cpu_start = time.perf_counter(), time.process_time()
        loaded = await nodes.load_custom_node(str(ROOT), module_parent="custom_nodes")
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    if not loaded:
        raise SystemExit("the pack did not load; the reason is above")
    libraries = {name.partition(".")[0] for name in set(sys.modules) - before if not Path(name).is_absolute()}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "new_libraries": sorted(libraries - set(sys.stdlib_module_names)),
        "comfyui": comfyui_version.__version__,
    }


if __name__ == "__main__":
    main()
