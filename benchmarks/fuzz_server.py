"""Hostile workflows and cancels at a real ComfyUI: the part of fuzz.py that needs a server."""

import copy
import json
import random
import shutil
import tempfile
import time
import urllib.error
from collections import Counter
from pathlib import Path
from typing import Any

from fuzz_files import MARKER, ROOT, TEXTS, VALUES, World, damage

CANCELLED_AT_SECONDS, HANGS_AFTER_SECONDS = 15.0, 30.0


def hostile_prompts(num_prompts: int, num_cancels: int, seed: int) -> dict[str, Any]:
    """Send damaged workflows to a real server, and cancel sound ones at random moments; return counts."""
    from safety_experts.demo.comfyui import ComfyServer
    from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
    from safety_experts.errors import SafetyExpertsError

    dice = random.Random(seed)
    counts: Counter = Counter()
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder) / "server") as server:
        world = World(Path(folder) / "world")
        server.add_model(ensure_toy_checkpoint())
        loras = server.base_directory / "models" / "loras"
        loras.mkdir(parents=True, exist_ok=True)
        graphs = _sound_graphs(world, loras)
        start = time.perf_counter()
        for number in range(num_prompts):
            world.refresh()
            for path in sorted(world.work.glob("*.safetensors")):
                if dice.random() < 0.5:
                    damage(path, dice, None)
                shutil.copy(path, loras / path.name)
            graph = json.loads(json.dumps(dice.choice(graphs)))
            for _ in range(dice.randint(1, 2)):
                _spoil_graph(graph, dice)
            try:
                entry = _finished(server, server.queue(graph))
            except (urllib.error.HTTPError, ValueError):
                counts["refused when queued"] += 1
            except SafetyExpertsError as error:
                if "stopped with exit code" in str(error):
                    raise
                counts["refused when queued"] += 1
            else:
                if entry is None:
                    counts["hang"] += 1
                    findings.append(f"hang: {json.dumps(graph)[:600]}")
                else:
                    _judge_entry(entry, counts, findings, graph)
            if world.changed_outside():
                findings.append(f"changed outside: {json.dumps(graph)[:600]}")
            if number % 50 == 49:
                print(f"{number + 1} prompts, {dict(counts)}", flush=True)
        cancels = _cancel(server, num_cancels, dice)
        (loras / "hate.safetensors").write_bytes((world.sound / "hate.safetensors").read_bytes())
        last = _finished(server, server.queue(graphs[0]))
        alive = last is not None and last["status"]["status_str"] == "success"
        told = MARKER in server.log_text()
        seconds = time.perf_counter() - start
    return {
        "prompts": num_prompts,
        "outcomes": dict(sorted(counts.items())),
        "tracebacks": sum(finding.startswith("traceback") for finding in findings),
        "hang": counts["hang"],
        "changed outside": sum(finding.startswith("changed") for finding in findings),
        "cancels": cancels,
        "server deaths": 0,
        "a sound workflow runs at the end": alive,
        "text of a prompt in the log": told,
        "seconds": round(seconds),
        "findings": findings[:20],
    }


def _finished(server: Any, prompt_id: str) -> dict[str, Any] | None:
    """Return a workflow's history entry; None where it did not even end when it was cancelled.

    One that asks for much work is cancelled after a while, as a person would.
    """
    start = time.monotonic()
    while (entry := server.history(prompt_id)) is None:
        waited = time.monotonic() - start
        if waited > CANCELLED_AT_SECONDS:
            server.interrupt()
        if waited > CANCELLED_AT_SECONDS + HANGS_AFTER_SECONDS:  # between two steps of a sampler on a busy CPU
            return None
        time.sleep(0.05)
    return entry


def _sound_graphs(world: World, loras: Path) -> list[dict[str, Any]]:
    for path in world.sound.glob("*.safetensors"):
        shutil.copy(path, loras / path.name)

    def load(name: str) -> dict[str, Any]:
        return {"class_type": "SafetyExpertsLoad", "inputs": {"expert_name": f"{name}.safetensors"}}

    def merge(method: str, **options: Any) -> dict[str, Any]:
        inputs = {"experts.expert_0": ["1", 0], "experts.expert_1": ["2", 0], "method": method, "weights": "1, 1"}
        return {
            "class_type": "SafetyExpertsMerge",
            "inputs": {**inputs, **{f"method.{k}": v for k, v in options.items()}},
        }

    def save(node: str) -> dict[str, Any]:
        return {"class_type": "SafetyExpertsSave", "inputs": {"expert": [node, 0], "expert_name": "fuzz/out"}}

    protect = {"style": ["1", 0], "experts.expert_0": ["2", 0], "space": "output", "strength": 1.0}
    graphs = [
        {"1": load("hate"), "2": load("hate"), "3": merge(method), "4": save("3")}
        for method in ("linear", "ties", "svd", "karcher", "della")
    ]
    names = sorted(path.stem for path in world.sound.glob("*.safetensors"))
    graphs += [{"1": load(name), "2": load("violence"), "3": merge("linear"), "4": save("3")} for name in names]
    graphs.append(
        {
            "1": load("hate"),
            "2": load("violence"),
            "3": {"class_type": "SafetyExpertsProtect", "inputs": protect},
            "4": save("3"),
        }
    )
    for path in sorted((ROOT / "example_workflows" / "api").glob("*.json")):
        graphs.append(json.loads(path.read_text(encoding="utf-8").replace("thorns", MARKER)))
    return graphs


def _spoil_graph(graph: dict[str, Any], dice: random.Random) -> None:
    own = [node for node in graph.values() if str(node.get("class_type", "")).startswith("SafetyExperts")]
    inputs = dice.choice(own or list(graph.values()))["inputs"]
    key = dice.choice([*inputs, "extra"])
    # ComfyUI itself logs a value that is in none of its lists, so no marker is put there.
    texts = [text for text in TEXTS if (text.isprintable() or text == "\x1b[31m") and MARKER not in text]
    values = [
        value
        for value in VALUES
        if value not in ("\ud800", MARKER, 10**400) and value == value and value != float("inf")
    ]
    inputs[key] = copy.deepcopy(dice.choice([*texts, *values]))
    if dice.random() < 0.1:
        del inputs[key]


def _judge_entry(entry: dict[str, Any], counts: Counter, findings: list[str], graph: Any) -> None:
    counts[entry["status"]["status_str"]] += 1
    for event, data in entry["status"]["messages"]:
        if event == "execution_error" and str(data.get("node_type", "")).startswith("SafetyExperts"):
            kind, text = str(data.get("exception_type", "")), str(data.get("exception_message", ""))
            if kind.endswith(("InputError", "SafetyExpertsError", "StoppedError")):
                counts["said in one line"] += 1
            else:
                findings.append(f"traceback: {data.get('node_type')} {kind}: {text[:200]} {json.dumps(graph)[:300]}")
            if MARKER in text:
                findings.append(f"told a text: {text[:200]}")


def _cancel(server: Any, num_cancels: int, dice: random.Random) -> dict[str, Any]:
    """Cancel the drawing of a dataset at random moments; the server must take the next prompt every time."""
    outcomes: Counter = Counter()
    sound = (ROOT / "example_workflows" / "api" / "1_build_preference_dataset.json").read_text(encoding="utf-8")
    for number in range(num_cancels):
        graph = json.loads(sound)
        for node in graph.values():
            if "dataset_name" in node["inputs"]:
                node["inputs"]["dataset_name"] = f"cancelled_{number}"
        prompt_id = server.queue(graph)
        time.sleep(dice.uniform(0.0, 1.5))
        server.interrupt()
        deadline = time.monotonic() + 120
        while (entry := server.history(prompt_id)) is None and time.monotonic() < deadline:
            server.interrupt()  # the first may have come before the work began
            time.sleep(0.2)
        events = [event for event, _ in entry["status"]["messages"]] if entry else ["hang"]
        outcomes["interrupted" if "execution_interrupted" in events else events[-1]] += 1
    return {"asked": num_cancels, **outcomes}
