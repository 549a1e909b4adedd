"""A denoiser of a few thousand weights and pairs in memory: enough for everything that is not about files."""

import hashlib

import torch
from safety_experts.preferences.dataset import PreferencePair


def tiny_unet(seed: int = 0):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )


def random_tensor(*shape: int, of: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(of.encode()).digest()[:4], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class MemoryCache:
    """Stands where PairCache stands: latents and conditions made from names."""

    def __init__(self, shapes: dict[str, tuple[int, int]] | None = None):
        self.shapes = shapes or {}

    def latents(self, pair, *, flipped=False):
        shape = (4, *self.shapes.get(pair.id, (4, 4)))
        chosen, rejected = (random_tensor(*shape, of=f"{pair.id}/{side}") for side in ("chosen", "rejected"))
        return (chosen.flip(-1), rejected.flip(-1)) if flipped else (chosen, rejected)

    def conditions(self, prompts):
        return {"hidden_states": torch.stack([random_tensor(3, 8, of=f"prompt {prompt}") for prompt in prompts])}


def make_pair(number: int, **values) -> PreferencePair:
    defaults = {
        "id": f"pair{number}",
        "prompt": f"a red circle with thorns {number}",
        "safe_prompt": f"a red circle {number}",
        "categories": ("violence",),
        "chosen_file_name": "c.png",
        "rejected_file_name": "r.png",
        "chosen_unsafe": False,
        "rejected_unsafe": True,
        "seed": number,
        "width_px": 32,
        "height_px": 32,
        "scores": {},
        "review": None,
        "source": "",
    }
    return PreferencePair(**{**defaults, **values})
