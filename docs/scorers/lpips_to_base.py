"""LPIPS v0.1 (AlexNet) to the base model's picture, for `evaluate --scorer lpips=docs/scorers/lpips_to_base.py`.

pip install lpips. Its heads are in its wheel; the trunk is torchvision's alexnet-owt-7be5be79.pth, converted once with
save_file(torch.load(PATH, weights_only=True), "alexnet.safetensors") and named by the variable LPIPS_TRUNK. Nothing is
downloaded.
"""

import os

import lpips
import numpy as np
import torch
from safetensors.torch import load_file

# A random trunk: with the default, torchvision would download one.
model = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
trunk = load_file(os.environ["LPIPS_TRUNK"])
model.net.load_state_dict({name: trunk[f"features.{name.partition('.')[2]}"] for name in model.net.state_dict()})
model.eval()


def score(images, prompts, base_images):
    return [
        {} if base is None else {"distance": distance(image, base)}
        for image, base in zip(images, base_images, strict=True)
    ]


@torch.inference_mode()
def distance(image, base) -> float:
    return float(model(pixels(image), pixels(base)))


def pixels(image):
    """Return [1, 3, h, w] in -1..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
