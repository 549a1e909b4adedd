"""Does the pack install and run by itself? Its zip into bare ComfyUIs, as ComfyUI-Manager does it, on every Python.

    python benchmarks/install.py --python 3.10=/usr/bin/python3.10 --comfyui 0.30.0=ComfyUI [--only 3.10,0.30.0]

Needs comfy-cli (`--comfy`) and uv (`--uv`), both from PyPI; ComfyUI itself is not there, so name the folders. For each
pair: a fresh environment with ComfyUI's requirements, the zip of `comfy node pack` unpacked into custom_nodes, each
line of requirements.txt installed by itself, the server started, nodes, help, words and templates asked for, a template
run on the toy checkpoint that the installed pack writes; with --uninstall the pack is removed and the same template
queued again.
Results of pairs that were tried before stay in the result file.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "install.json"
FOLDER = "safety-experts"  # ComfyUI-Manager names it after [project].name
TEMPLATE = "1_build_preference_dataset"
PAIRS_EACH, START_SECONDS, RUN_SECONDS = 2, 1800, 1800
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Try every pair and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="VERSION=PATH")
    parser.add_argument("--comfyui", action="append", default=[], metavar="VERSION=FOLDER")
    parser.add_argument("--only", default="", metavar="PYTHON,COMFYUI", help="one pair only")
    parser.add_argument("--uninstall", action="store_true", help="also remove the pack and queue the template again")
    parser.add_argument("--comfy", default="comfy", help="the command of comfy-cli")
    parser.add_argument("--uv", default="uv", help="the command uv")
    parser.add_argument("--torch", default="torch==2.12.1 torchvision==0.27.1 torchaudio==2.11.0")
    parser.add_argument("--work", type=Path, default=Path("/tmp/safety-experts-install"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    packed = pack(options.comfy, options.work)
    for python, interpreter in (item.split("=", 1) for item in options.python):
        for comfyui, tree in (item.split("=", 1) for item in options.comfyui):
            if options.only in ("", f"{python},{comfyui}"):
                tried = {"python": python, "comfyui": comfyui, "machine": machine(), "date": today()}
                tried |= attempt(options, Path(interpreter), Path(tree), Path(packed["zip"]))
                write(packed, tried)


def today() -> str:
    return datetime.date.today().isoformat()


def machine() -> str:
    return f"{platform.platform()}, {os.cpu_count()} CPU cores"


def pack(comfy: str, work: Path) -> dict[str, Any]:
    """Validate and pack the checkout; return what was said and what the zip holds."""
    said = run([comfy, "--skip-prompt", "node", "validate"], cwd=ROOT)
    run([comfy, "--skip-prompt", "node", "pack"], cwd=ROOT)
    archive = work / "node.zip"
    shutil.move(ROOT / "node.zip", archive)
    with zipfile.ZipFile(archive) as opened:
        names = opened.namelist()
    return {
        "zip": str(archive),
        "comfy_cli": json.loads(run([comfy, "--version"]).strip().splitlines()[-1])["data"]["version"],
        "validate": [line for line in said.splitlines() if line.strip()],
        "bytes": archive.stat().st_size,
        "files": len(names),
        "for_its_makers": [n for n in names if re.search(r"(^|/)(tests|benchmarks|__pycache__|\.\w+)(/|$)|\.pyc$", n)],
    }


def attempt(options: argparse.Namespace, interpreter: Path, tree: Path, archive: Path) -> dict[str, Any]:
    """Install into a bare ComfyUI and use it; `problem` says where it ended, if it did."""
    base = options.work / "base"
    # A name of its own: uv keeps what it knows of an interpreter by its path.
    venv = options.work / f"venv-{interpreter.name}-{tree.name}"
    python = venv / "bin" / "python"
    for folder in (base, venv):
        shutil.rmtree(folder, ignore_errors=True)
    result: dict[str, Any] = {"problem": None}
    try:
        run([options.uv, "venv", "--quiet", "--seed", "--python", str(interpreter), str(venv)])
        requirements = ["--requirement", str(tree / "requirements.txt")]
        run([options.uv, "pip", "install", "--quiet", "--python", str(python), *options.torch.split(), *requirements])
        before = versions(python)
        for name in ("checkpoints", "loras"):
            (base / "models" / name).mkdir(parents=True)
        folder = base / "custom_nodes" / FOLDER
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        started = time.monotonic()
        for line in (folder / "requirements.txt").read_text().split():
            run([options.uv, "pip", "install", "--quiet", "--python", str(python), line])  # Manager's use_uv
        result["requirements_seconds"] = round(time.monotonic() - started)
        after = versions(python)
        result["added"] = sorted(f"{name} {after[name]}" for name in after.keys() - before)
        result["changed"] = sorted(f"{n} {before[n]} -> {after[n]}" for n in before if after.get(n) != before[n])
        result["torch"] = after["torch"]
        run(
            [
                str(python),
                str(folder / "cli.py"),
                "demo",
                "--checkpoint",
                str(base / "models/checkpoints/toy.safetensors"),
            ]
        )
        with Server(python, tree, base) as server:
            result |= look(server)
            result["template"] = run_template(server)
        if options.uninstall:
            shutil.rmtree(folder)  # what uninstalling does
            with Server(python, tree, base) as server:
                result["uninstalled"] = missing_nodes(server)
    except (subprocess.CalledProcessError, urllib.error.URLError, RuntimeError, OSError, KeyError, ValueError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        result["problem"] = " ".join(detail.split())[-600:]
    shutil.rmtree(venv, ignore_errors=True)
    return result


def run(command: list[str], cwd: Path | None = None) -> str:
    finished = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **OFFLINE})
    if finished.returncode:
        raise subprocess.CalledProcessError(finished.returncode, command, finished.stdout, finished.stderr)
    return finished.stdout


def versions(python: Path) -> dict[str, str]:
    listed = json.loads(run([str(python), "-m", "pip", "list", "--format", "json"]))
    return {entry["name"].lower(): entry["version"] for entry in listed}


class Server:
    """ComfyUI as it starts by itself on a CPU: every custom node of its base directory, nothing switched off."""

    def __init__(self, python: Path, tree: Path, base: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._log = base / "server.log"
        command = [
            str(python),
            "main.py",
            "--cpu",
            "--port",
            self.url.rpartition(":")[2],
            "--base-directory",
            str(base),
        ]
        command += ["--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                command, cwd=tree, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **OFFLINE}
            )

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.__exit__()
                    raise RuntimeError(f"the server did not start: {self.log()[-600:]}") from None
                time.sleep(1)

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=60)

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str) -> bytes:
        return urllib.request.urlopen(self.url + path, timeout=60).read()

    def queue(self, graph: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"prompt": graph}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            return json.loads(urllib.request.urlopen(request, timeout=60).read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())


def look(server: Server) -> dict[str, Any]:
    """Return what the server has of the pack; raises RuntimeError where it failed to import."""
    log = server.log()
    if "IMPORT FAILED" in log:
        raise RuntimeError(next(line for line in log.splitlines() if "IMPORT FAILED" in line))
    seconds = re.search(rf"([0-9.]+) seconds: .*{FOLDER}", log)
    nodes = [name for name in json.loads(server.get("/object_info")) if name.startswith("SafetyExperts")]
    expected = json.loads((ROOT / "tests" / "comfyui" / "node_schemas.json").read_text(encoding="utf-8"))
    if missing := sorted(set(expected) - set(nodes)):
        raise RuntimeError(f"nodes missing: {missing}")
    served = json.loads(server.get("/workflow_templates"))
    return {
        "import_seconds": float(seconds.group(1)) if seconds else None,
        "nodes": len(nodes),
        "templates": len(served.get(FOLDER, [])),
        "help_pages": sum(bool(server.get(f"/extensions/{FOLDER}/docs/{name}.md")) for name in nodes),
        "scripts": sum(f"/{FOLDER}/" in path for path in json.loads(server.get("/extensions"))),
        "languages": sorted(
            language
            for language, words in json.loads(server.get("/i18n")).items()
            if "SafetyExpertsTrain" in words.get("nodeDefs", {})
        ),
    }


def small_template() -> dict[str, Any]:
    """Return the template on the toy checkpoint, with few pairs."""
    graph = json.loads((ROOT / "example_workflows" / "api" / f"{TEMPLATE}.json").read_text(encoding="utf-8"))
    for node in graph.values():
        inputs = node["inputs"]
        for name in ("ckpt_name", "checkpoint"):
            if inputs.get(name) == "safety_experts_toy.safetensors":
                inputs[name] = "toy.safetensors"
        if "source.taxonomy" in inputs:
            inputs["source.taxonomy"] = re.sub(
                r"pairs_per_category: \d+", f"pairs_per_category: {PAIRS_EACH}", inputs["source.taxonomy"]
            )
    return graph


def run_template(server: Server) -> dict[str, Any]:
    """Queue the template and wait until it is done."""
    started = time.monotonic()
    answer = server.queue(small_template())
    if "prompt_id" not in answer:
        raise RuntimeError(f"the template was refused: {json.dumps(answer)[:600]}")
    while not (entry := json.loads(server.get(f"/history/{answer['prompt_id']}")).get(answer["prompt_id"])):
        if time.monotonic() > started + RUN_SECONDS:
            raise RuntimeError("the template did not finish")
        time.sleep(1)
    status = entry["status"]["status_str"]
    if status != "success":
        raise RuntimeError(f"the template ended as {status}: {json.dumps(entry['status']['messages'])[-600:]}")
    return {"name": TEMPLATE, "status": status, "seconds": round(time.monotonic() - started)}


def missing_nodes(server: Server) -> dict[str, Any]:
    """Return what a workflow says after the pack is gone, from the server and from its own file."""
    error = server.queue(small_template())["error"]
    saved = json.loads((ROOT / "example_workflows" / f"{TEMPLATE}.json").read_text(encoding="utf-8"))
    ours = [node for node in saved["nodes"] if node["type"].startswith("SafetyExperts")]
    return {
        "server_says": error["message"],
        "nodes_that_name_the_pack": sum(node["properties"].get("cnr_id") == FOLDER for node in ours),
        "nodes_of_the_pack": len(ours),
    }


def write(packed: dict[str, Any], tried: dict[str, Any]) -> None:
    """Put a result into the file, in place of an earlier one of the same pair."""
    before = json.loads(RESULT.read_text(encoding="utf-8"))["tried"] if RESULT.exists() else []
    key = ("python", "comfyui")
    kept = [old for old in before if any(old[name] != tried[name] for name in key)]
    rows = sorted([*kept, tried], key=lambda row: ([int(n) for n in row["python"].split(".")], row["comfyui"]))
    packed = {name: value for name, value in packed.items() if name != "zip"}
    result = {"claim": "the zip installs and runs by itself", "pack": packed, "tried": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(tried) + "\n")


if __name__ == "__main__":
    main()
