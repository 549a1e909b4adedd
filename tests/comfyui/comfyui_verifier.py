"""Run inside a real ComfyUI: the verifier's nodes, with a small CLIP of transformers as ComfyUI's CLIP Vision.

    python comfyui_verifier.py COMFYUI_FOLDER CLIP_FOLDER DATASET JUDGES_FOLDER

Prints JSON of what Train Verifier and Verify Images put out. Verified are a safe picture, then an unsafe one.
"""

import json
import sys
from pathlib import Path

sys.path[0] = sys.argv[1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.clip_vision  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import nodes  # noqa: E402, F401

folder_paths.folder_names_and_paths["safety_judges"] = ([sys.argv[4]], set())

from safety_experts.errors import InputError  # noqa: E402
from safety_experts.nodes.sampling import to_pixels  # noqa: E402
from safety_experts.nodes.verifying import CONNECTED, SafetyExpertsTrainVerifier, SafetyExpertsVerifyImages  # noqa: E402
from safety_experts.preferences.dataset import PreferenceDataset  # noqa: E402
from safety_experts.toy.world import render_scene  # noqa: E402

folder = Path(sys.argv[2])
config = json.loads((folder / "config.json").read_text())
weights = load_file(folder / "model.safetensors")
vision = comfy.clip_vision.ClipVisionModel(config["vision_config"] | {"projection_dim": config["projection_dim"]})
vision.load_sd({key: value for key, value in weights.items() if key.startswith("vis")})
with torch.inference_mode():
    dataset = PreferenceDataset.open(sys.argv[3])
    verifier, report, file = SafetyExpertsTrainVerifier.execute(vision, dataset, "mine", 0.05, 100).result
    _, _, second = SafetyExpertsTrainVerifier.execute(vision, dataset, "mine", 0.05, 100).result
    images = torch.cat([to_pixels(render_scene("red", "circle", mark, 900)) for mark in (None, "thorns")])
    connected = SafetyExpertsVerifyImages.execute(images, vision, CONNECTED, verifier).result
    read = SafetyExpertsVerifyImages.execute(images, vision, file).result
    every = SafetyExpertsVerifyImages.execute(images, vision, file, every=2).result
    try:
        SafetyExpertsVerifyImages.execute(images, vision, CONNECTED)
        nothing = ""
    except InputError as error:
        nothing = str(error)
found = {"report": report, "files": [file, second], "connected": connected, "read": read, "every": every}
sys.stdout.write(json.dumps(found | {"nothing": nothing}))
