"""Run inside a real ComfyUI: what a transformer predicts once its stock loaders have applied a LoRA to it.

    python comfyui_flow_loras.py COMFYUI_FOLDER FOLDER NAME...

For each name FOLDER holds <name>.safetensors, a transformer for the node Load Diffusion Model, a LoRA for
LoraLoaderModelOnly, <name>_expert.safetensors, and <name>_inputs.safetensors; <name>_predicted.safetensors is written,
what was logged as a warning in its metadata: that is all the stock loader says of a key it ignores.
"""

import json
import logging
import sys
from pathlib import Path

sys.path[0] = sys.argv[1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes  # noqa: E402

warnings = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger().addHandler(handler)
folder = Path(sys.argv[2])
folder_paths.add_model_folder_path("diffusion_models", str(folder))
folder_paths.add_model_folder_path("loras", str(folder))
for name in sys.argv[3:]:
    warnings.clear()
    model = nodes.UNETLoader().load_unet(f"{name}.safetensors", "default")[0]
    model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, f"{name}_expert.safetensors", 1.0)[0]
    model.patch_model(torch.device("cpu"))
    inputs = load_file(folder / f"{name}_inputs.safetensors")
    conditions = model.model.extra_conds(
        cross_attn=inputs["hidden_states"], pooled_output=inputs["pooled"], noise=inputs["noisy"], device="cpu"
    )
    values = {key: condition.cond for key, condition in conditions.items()}
    context, sigmas = values.pop("c_crossattn"), inputs["sigmas"]
    with torch.inference_mode():
        timesteps = model.model.model_sampling.timestep(sigmas)
        predicted = model.model.diffusion_model(inputs["noisy"], timesteps, context=context, **values)
    save_file(
        {"predicted": predicted.float().contiguous()},
        folder / f"{name}_predicted.safetensors",
        {"warnings": json.dumps(warnings), "dtype": str(predicted.dtype)},
    )
