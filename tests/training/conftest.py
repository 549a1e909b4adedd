import pytest
import torch
from safety_experts.models.denoiser import UNetDenoiser
from safety_experts.training.batches import BatchPlan
from safety_experts.training.held_out import HeldOut, split_pairs
from safety_experts.training.lora import attach_lora
from safety_experts.training.policy import LoraPolicy
from safety_experts.training.recipe import Recipe
from safety_experts.training.run import TrainingRun
from tiny_models import MemoryCache, make_pair, tiny_unet


@pytest.fixture
def pairs():
    return [make_pair(number) for number in range(6)]


@pytest.fixture
def make_run(pairs):
    """Build a run on a fresh tiny UNet; `options` are recipe fields."""

    def build(cache=None, run_pairs=None, retained=None, **options) -> TrainingRun:
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
        held_out = HeldOut(set_aside, cache, recipe, device, retained) if set_aside else None
        plan = BatchPlan(trained_on, cache, recipe, retained)
        return TrainingRun(LoraPolicy(denoiser, recipe.lora_alpha), plan, recipe, device, held_out=held_out)

    return build
