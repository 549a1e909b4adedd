"""The real server starts with the pack, and starting is all that the pack does then."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safety_experts.demo.comfyui import ComfyServer
from safety_experts.errors import InputError, SafetyExpertsError

ROOT = Path(__file__).resolve().parents[2]


def test_the_server_boots_and_the_pack_loads(server):
    assert "custom_nodes/safety-experts" in server.log_text().replace("\\", "/")
    server.check_log()


def test_every_node_of_the_pack_has_our_prefix_and_our_category(server):
    ours = {
        name: node
        for name, node in server.object_info().items()
        if node["python_module"] == "custom_nodes.safety-experts"
    }

    assert ours
    assert all(name.startswith("SafetyExperts") for name in ours)
    assert all(node["category"].split("/")[0] == "safety experts" for node in ours.values())


def test_loading_the_pack_imports_no_heavy_library():
    probe = [sys.executable, ROOT / "benchmarks" / "import_time.py", "--probe"]
    finished = subprocess.run(probe, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr

    imported = json.loads(finished.stdout.splitlines()[-1])["new_libraries"]

    assert not {"diffusers", "peft", "accelerate", "transformers", "pandas", "pyarrow"} & set(imported)


def test_a_refused_workflow_is_one_line_that_names_the_node(server):
    workflow = {"7": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "absent.safetensors"}}}
    workflow["8"] = {"class_type": "PreviewAny", "inputs": {"source": ["7", 0]}}

    with pytest.raises(SafetyExpertsError, match=r"node 7 \(CheckpointLoaderSimple\).*absent\.safetensors") as caught:
        server.queue(workflow)

    assert "\n" not in str(caught.value)


def test_a_failing_node_is_one_line_that_names_it_and_the_server_goes_on(server):
    too_small = {"1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}}
    too_small["2"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "../outside"}}

    with pytest.raises(SafetyExpertsError, match=r"node 2 \(SaveImage\) failed"):
        server.run(too_small)

    too_small["2"]["inputs"]["filename_prefix"] = "inside"
    images = server.run(too_small)["outputs"]["2"]["images"]
    assert server.view(images[0]).startswith(b"\x89PNG")


def test_a_server_that_cannot_start_says_why_and_where_its_log_is(tmp_path):
    with pytest.raises(SafetyExpertsError, match="--no-such-option") as caught:
        ComfyServer(tmp_path, cpu=True, extra_arguments=["--no-such-option"]).__enter__()

    assert str(tmp_path / "comfyui.log") in str(caught.value)


def test_another_copy_of_the_pack_is_left_alone(tmp_path):
    copy = tmp_path / "custom_nodes" / "safety-experts" / "__init__.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("# somebody's own")

    with pytest.raises(InputError, match="another copy of the pack"):
        ComfyServer(tmp_path, cpu=True).__enter__()

    assert copy.read_text() == "# somebody's own"
