import pytest
import torch
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.info import ExpertInfo

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
SHAPES = {LINEAR: (12, 10), CROSS: (12, 7), CONV: (6, 5, 3, 3)}


@pytest.fixture
def make_expert():
    """Random experts: `make_expert(seed, rank, alpha, categories, layers)`."""

    def make(seed=0, rank=4, alpha=None, categories=("violence",), layers=tuple(SHAPES), dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name in layers:
            out, *inner = SHAPES[name]
            down = torch.randn(rank, *inner, generator=generator).to(dtype)
            up = torch.randn(out, rank, *[1] * (len(inner) - 1), generator=generator).to(dtype)
            made[name] = LoraLayer(down, up, float(rank if alpha is None else alpha))
        return Expert(made, ExpertInfo(categories=list(categories)), f"expert_{seed}")

    return make


@pytest.fixture
def dense():
    """Return ΔW of a layer in float64, computed element by element index, apart from the code under test."""

    def delta(expert, name):
        layer = expert.layers[name]
        product = torch.einsum(
            "or,ri->oi", layer.up.double().reshape(layer.up.shape[0], -1), layer.down.double().flatten(1)
        )
        out, *inner = SHAPES[name]
        return (product * (layer.alpha / layer.down.shape[0])).reshape(out, *inner)

    return delta
