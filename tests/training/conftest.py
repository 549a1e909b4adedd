"""A denoiser of a few thousand weights and pairs in memory: enough for everything that is not about files."""

import hashlib

import pytest
import torch
from safety_experts.preferences.dataset import PreferencePair
from safety_experts.training.batches import BatchPlan
from safety_experts.training.denoiser import UNetDenoiser
from safety_experts.training.held_out import HeldOut, split_pairs
from safety_experts.training.lora import attach_lora
from safety_experts.training.recipe import Recipe
from safety_experts.training.run import TrainingRun


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


@pytest.fixture
def pairs():
    return [make_pair(number) for number in range(6)]


@pytest.fixture
def make_run(pairs):
    """Build a run on a fresh tiny UNet; `options` are recipe fields."""

    def build(cache=None, run_pairs=None, **options) -> TrainingRun:
        defaults = {
            "rank": 2,
            "batch_size": 2,
            "accumulation_steps": 1,
            "steps": 6,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "precision": "fp32",
            "caption_dropout_fraction": 0.2,
        }
        recipe = Recipe(**{**defaults, **options})
        unet = tiny_unet()
        attach_lora(unet, recipe)
        denoiser = UNetDenoiser(unet, torch.linspace(0.999, 0.005, 1000), "epsilon")
        cache, device = cache or MemoryCache(), torch.device("cpu")
        trained_on, set_aside = split_pairs(run_pairs or pairs, recipe)
        held_out = HeldOut(set_aside, cache, recipe, device) if set_aside else None
        plan = BatchPlan(trained_on, cache, recipe)
        return TrainingRun(unet, denoiser, plan, recipe, device, held_out=held_out)

    return build
