"""Every node's ids, inputs, their order and defaults, as recorded: workflows hold them, so a change has to be meant.

`python tests/comfyui/test_node_schemas.py` records them anew; the difference is then reviewed. A workflow keeps the
values of widgets by position: a new input goes to the end of the optional ones, and none goes away.
"""

import json
from pathlib import Path
from typing import Any

from safety_experts.demo.comfyui import ComfyServer

RECORD = Path(__file__).parent / "node_schemas.json"
# Filled from folders and from ComfyUI itself.
NOT_OURS = {"checkpoint", "sampler_name", "scheduler", "expert_name", "dataset_name"}
NOT_OURS |= {"file", "folder", "vectors", "head", "heads"}
WORDS = {"tooltip", "placeholder", "advanced", "display_name", "multiline", "multiselect"}


def schemas(object_info: dict[str, Any]) -> dict[str, Any]:
    """Return node id -> inputs in order and outputs, of the pack's nodes."""
    return {
        name: {
            "category": node["category"],
            "inputs": _inputs(node["input"]),
            "outputs": [" ".join(output) for output in zip(node["output_name"], node["output"], strict=True)],
            "is_output": node["output_node"],
        }
        for name, node in sorted(object_info.items())
        if node["python_module"] == "custom_nodes.safety-experts"
    }


def _inputs(given: dict[str, dict]) -> list[list]:
    return [
        [kind, name, spec[0], _options(name, spec[1] if len(spec) > 1 else {})]
        for kind in ("required", "optional")
        for name, spec in given.get(kind, {}).items()
    ]


def _options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in options.items() if key not in WORDS}
    if name in NOT_OURS:
        kept.pop("options", None)
    if isinstance(kept.get("options"), list):
        kept["options"] = [
            {"key": option["key"], "inputs": _inputs(option["inputs"])} if isinstance(option, dict) else option
            for option in kept["options"]
        ]
    if "template" in kept:
        template = kept["template"]
        kept["template"] = {**template, "input": _inputs(template["input"])} if "input" in template else template
    return kept


def test_every_nodes_schema_is_the_recorded_one(server):
    assert schemas(server.object_info()) == json.loads(RECORD.read_text(encoding="utf-8")), f"run python {__file__}"


def _record() -> None:
    with ComfyServer() as server:
        lines = [f"  {json.dumps(name)}: {_pretty(node)}" for name, node in schemas(server.object_info()).items()]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _pretty(node: dict[str, Any]) -> str:
    """Return a node's JSON with a line for each input."""
    inputs = ",\n".join(f"      {json.dumps(line, ensure_ascii=False)}" for line in node["inputs"])
    rest = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in node.items() if key != "inputs")
    return f'{{{rest}, "inputs": [\n{inputs}\n  ]}}'


if __name__ == "__main__":
    _record()
