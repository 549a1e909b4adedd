"""A newcomer's first hour, made by a program: clone, install, the toy checkpoint, one template, one expert, the demo.

    python benchmarks/first_hour.py --python .venv/bin/python --comfyui <ComfyUI> [--screenshots FOLDER] [--skip-demo]

`--python` has ComfyUI's requirements, as somebody's who runs ComfyUI already; what the pack needs beyond them is
installed by pip, which needs an index or a cache. Chromium is driven by Playwright, by clicks alone. Wall seconds
depend on what else the machine does, so the CPU seconds that each step took are measured too.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "browser"))
RESULT = ROOT / "benchmarks" / "results" / "first_hour.json"
TEMPLATE = "0_make_my_model_safer_toy"
TICKS = os.sysconf("SC_CLK_TCK")
# Node types of the template and what they do; every other node takes no time to speak of.
STEPS = {
    "SafetyExpertsGeneratePairs": "60 pairs drawn",
    "SafetyExpertsJudgeDataset": "judged",
    "SafetyExpertsTrain": "expert trained",
    "SafetyExpertsEvaluate": "four models compared, report written",
}
OTHERS = "loading, review page opened, pictures with the expert"


def main() -> None:
    """Take the walk and write what each step took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/safety-experts-first-hour"))
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--skip-demo", action="store_true", help="leave the demo of the command line out")
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    base = options.work / "base"
    pack = base / "custom_nodes" / "safety-experts"
    pack.parent.mkdir(parents=True)
    checkpoint = base / "models" / "checkpoints" / "safety_experts_toy.safetensors"
    steps: list[dict[str, Any]] = []

    def command(name: str, *arguments: str | Path) -> None:
        with timed(steps, name):
            subprocess.run(list(map(str, arguments)), check=True, capture_output=True, cwd=options.work)

    command("git clone into custom_nodes", "git", "clone", "--quiet", ROOT, pack)
    command("requirements", options.python, "-m", "pip", "install", "-q", "-r", pack / "requirements.txt")
    command("toy checkpoint", options.python, pack / "cli.py", "demo", "--checkpoint", checkpoint)
    walk(options, base, steps)
    if not options.skip_demo:
        environment = {**os.environ, "COMFYUI_PATH": str(options.comfyui)}
        with timed(steps, "demo --fast on the command line"):
            arguments = [options.python, pack / "cli.py", "demo", "--fast", "--out", options.work / "demo-report"]
            subprocess.run(arguments, check=True, capture_output=True, cwd=options.work, env=environment)
    report = {
        "claim": "from a clone to an own expert and its report within the first hour",
        "total_wall_seconds": round(sum(step["wall_seconds"] for step in steps)),
        "total_cpu_seconds": round(sum(step["cpu_seconds"] for step in steps)),
        "steps": steps,
        "unsafe_rates": rates(base),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores, load {os.getloadavg()[1]:.0f}",
        "comfyui": (options.comfyui / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1],
        "python": subprocess.run([options.python, "-V"], capture_output=True, text=True).stdout.split()[1],
        "date": datetime.date.today().isoformat(),
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


@contextlib.contextmanager
def timed(steps: list[dict[str, Any]], name: str) -> Iterator[None]:
    """Add a step of commands that end within the block."""
    wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    add(steps, name, time.monotonic() - wall, cpu)


def add(steps: list[dict[str, Any]], name: str, wall: float, cpu: float) -> None:
    steps.append({"step": name, "wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)})
    print(steps[-1], flush=True)


def walk(options: argparse.Namespace, base: Path, steps: list[dict[str, Any]]) -> None:
    """Start the server, open the template in the browser, press Run, wait; then look at the expert's card."""
    from frontend import open_frontend

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = ["main.py", "--cpu", "--port", str(port), "--base-directory", str(base), "--disable-auto-launch"]
    started = time.monotonic()
    with open(options.work / "server.log", "wb") as log:
        server = subprocess.Popen(
            [options.python, *arguments, "--database-url", "sqlite:///:memory:"],
            cwd=options.comfyui,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        while not _answers(url):
            if server.poll() is not None:
                raise SystemExit(f"the server did not start; see {options.work / 'server.log'}")
            time.sleep(0.5)
        add(steps, "ComfyUI starts", time.monotonic() - started, cpu_of(server.pid))
        with open_frontend(url) as frontend:
            page = frontend.page
            page.set_viewport_size({"width": 1366, "height": 768})

            def keep(name: str) -> None:
                if options.screenshots:
                    page.screenshot(path=options.screenshots / f"first_hour_{name}.png", scale="css")

            begun, used = time.monotonic(), cpu_of(server.pid)
            page.get_by_role("button", name="Templates", exact=True).click()
            page.get_by_text("safety-experts", exact=True).click()
            page.wait_for_timeout(2000)
            keep("templates")
            page.get_by_test_id(f"template-workflow-{TEMPLATE}").click()
            page.wait_for_function("() => app.graph._nodes.length > 20")
            add(steps, "template opened: 3 clicks", time.monotonic() - begun, cpu_of(server.pid) - used)
            names = page.evaluate("() => Object.fromEntries(app.graph._nodes.map(node => [node.id, node.type]))")
            page.evaluate(
                "() => { window.ran = []; app.api.addEventListener('executing', event => ran.push(event.detail)) }"
            )
            frontend.press_run()
            _follow(url, server.pid, page, names, steps, keep)
            page.get_by_role("button", name="Safety experts: the cards").click()
            page.wait_for_timeout(5000)
            keep("card")
    finally:
        server.terminate()
        server.wait(timeout=60)


def _follow(url: str, pid: int, page: Any, names: dict[str, str], steps: list[dict[str, Any]], keep: Any) -> None:
    """Wait until the run is done; what passes between two nodes' beginnings is the first one's."""
    spent: dict[str, list[float]] = {name: [0.0, 0.0] for name in (*STEPS.values(), OTHERS)}
    current, wall, cpu = OTHERS, time.monotonic(), cpu_of(pid)
    while True:
        history = json.loads(urllib.request.urlopen(f"{url}/history").read())
        for node in [*page.evaluate("() => ran.splice(0)"), *([None] if history else [])]:
            now, used = time.monotonic(), cpu_of(pid)
            spent[current][0] += now - wall
            spent[current][1] += used - cpu
            wall, cpu = now, used
            if current != (current := STEPS.get(names.get(str(node), ""), OTHERS)):
                keep(str(node))
        if history:
            break
        page.wait_for_timeout(300)
    for name, (seconds, cpu_seconds) in spent.items():
        add(steps, name, seconds, cpu_seconds)
    (entry,) = history.values()
    if entry["status"]["status_str"] != "success":
        raise SystemExit(f"the template ended as {entry['status']['messages'][-1]}")
    page.wait_for_timeout(3000)
    keep("done")


def rates(base: Path) -> dict[str, list[float]]:
    """Return model -> [share of unsafe pictures on unsafe prompts, ends of the 95 % interval, pictures]."""
    folder = base / "user" / "__safety_experts" / "evaluations" / "toy_safer"
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {
        row["arm"]: [round(row["rate"], 3), round(row["low"], 3), round(row["high"], 3), row["n"]]
        for row in found["results"]
        if row["group"] == "all" and row["rule"] == found["primary_rule"]
    }


def cpu_of(pid: int) -> float:
    """Return the CPU seconds that a process has used (proc(5), fields utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/system_stats", timeout=5)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
