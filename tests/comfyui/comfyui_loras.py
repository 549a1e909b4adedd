"""Run inside a real ComfyUI: what its stock LoraLoader makes of LoRA files.

    python comfyui_loras.py COMFYUI_FOLDER CHECKPOINT LORA_FOLDER OUT.safetensors

The model is the checkpoint's; files that begin with `sdxl` get a full SDXL UNet without weights. OUT holds, for file f
and layer l, the tensor `f/l`: ΔW of the layer, flattened to a matrix, times `probe`; its metadata holds the warnings.
"""

import json
import logging
import sys
from pathlib import Path

sys.path[0] = sys.argv[1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.lora  # noqa: E402
import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import nodes  # noqa: E402

SDXL = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_heads": -1,
    "num_head_channels": 64, "use_spatial_transformer": True, "use_linear_in_transformer": True, "legacy": False,
    "num_classes": "sequential", "adm_in_channels": 2816,
}  # fmt: skip


class Warnings(logging.Handler):
    """Keeps what is logged as a warning or worse; that is all the stock loader says of a key it ignores."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def main() -> None:
    checkpoint, folder, out = sys.argv[2:]
    folder_paths.add_model_folder_path("loras", folder)
    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(checkpoint)
    warnings = Warnings()
    logging.getLogger().addHandler(warnings)
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name.startswith("sdxl"):
            loaded = nodes.LoraLoader().load_lora(sdxl_model(), None, path.name, 1.0, 0.0)
        else:
            loaded = nodes.LoraLoader().load_lora(model, clip, path.name, 1.0, 1.0)
        found |= {f"{path.stem}/{layer}": value for layer, value in changes(path, *loaded).items()}
    save_file(found, out, {"warnings": json.dumps(warnings.messages)})


def sdxl_model() -> comfy.model_patcher.ModelPatcher:
    config = comfy.supported_models.SDXL(SDXL)
    model = comfy.model_base.SDXL(config, device="meta")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def changes(path: Path, model, clip) -> dict[str, torch.Tensor]:
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = {key: (patches, comfy.utils.get_attr(model.model, key)) for key, patches in model.patches.items()}
    if clip is not None:
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        patched = clip.patcher.patches.items()
        weights |= {key: (patches, comfy.utils.get_attr(clip.cond_stage_model, key)) for key, patches in patched}
    with safe_open(path, "pt") as file:
        layers = [key.removesuffix(".alpha") for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
    found = {}
    for layer in layers:
        if keys.get(layer) in weights:
            patches, weight = weights[keys[layer]]
            change = comfy.lora.calculate_weight(patches, torch.zeros(weight.shape), keys[layer]).flatten(1)
            found[layer] = change @ probe(change.shape[1])
    return found


def probe(width: int) -> torch.Tensor:
    """Return two fixed random columns: ΔW's that agree on them are equal, and the file stays small."""
    return torch.randn(width, 2, generator=torch.Generator().manual_seed(width))


if __name__ == "__main__":
    main()
