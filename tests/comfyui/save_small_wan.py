"""Write a random Wan model of 1 block and a TAESD of 16 channels, as files that ComfyUI's loaders detect.

    COMFYUI_PATH=<ComfyUI> python save_small_wan.py FOLDER

A program of its own, as only one may be ComfyUI in a process. Its text is SD3's (CLIPLoader, type sd3: 4096 wide).
"""

import math
import os
import sys
from pathlib import Path

sys.path.insert(0, os.environ["COMFYUI_PATH"])
folder, sys.argv = Path(sys.argv[1]), ["main.py", "--cpu"]
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.ops  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


def fill(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in model.state_dict().items():
        if value.ndim >= 2:
            weights[name] = torch.randn(value.shape, generator=generator) / math.sqrt(max(1, value[0].numel()))
        else:
            weights[name] = torch.zeros(value.shape) if name.endswith("bias") else torch.ones(value.shape)
    return weights


wan = WanModel(
    dim=128, ffn_dim=256, num_heads=1, num_layers=2, in_dim=16, out_dim=16, operations=comfy.ops.disable_weight_init
)
save_file(fill(wan, 0), folder / "wan.safetensors")
save_file(fill(TAESD(latent_channels=16), 1) | {"vae_shift": torch.zeros(())}, folder / "taesd16.safetensors")
