"""Layers that ComfyUI keeps in one piece, split as diffusers has them; diffusers' own tiny models are the judge."""

import pytest
import torch
from closeness import assert_close_at_scale
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.experts.blocks import rank_blocks
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.fused import diffusers_layers, in_one_spelling, native_family
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import merge_experts
from safety_experts.tensor_file import read_tensors

W = 64
DOUBLE = {
    "double_blocks_0_img_attn_qkv": (3 * W, W),
    "double_blocks_0_img_attn_proj": (W, W),
    "double_blocks_0_txt_attn_qkv": (3 * W, W),
    "double_blocks_0_txt_attn_proj": (W, W),
}
# Names and shapes [out, in] of what native training writes.
NATIVE = {
    "flux": DOUBLE | {"single_blocks_0_linear1": (7 * W, W), "single_blocks_0_linear2": (W, 5 * W)},
    "flux2": DOUBLE | {"single_blocks_0_linear1": (9 * W, W), "single_blocks_0_linear2": (W, 4 * W)},
    "sd3": {
        "joint_blocks_0_x_block_attn_qkv": (3 * W, W),
        "joint_blocks_0_x_block_attn_proj": (W, W),
        "joint_blocks_0_context_block_attn_qkv": (3 * W, W),
        "joint_blocks_0_context_block_attn_proj": (W, W),
        "joint_blocks_1_x_block_attn_qkv": (3 * W, W),
    },
    "z-image": {"layers_0_attention_qkv": (3 * W, W), "noise_refiner_0_attention_out": (W, W)},
    "lumina2": {"layers_0_attention_qkv": (2 * W, W), "context_refiner_0_attention_out": (W, W)},
    "qwen-image": {f"transformer_blocks_0_attn_{name}": (W, W) for name in ("to_q", "add_k_proj", "to_out_0")},
    "wan2.1": {"blocks_0_self_attn_q": (W, W), "blocks_1_cross_attn_o": (W, W)},
}
HEADS = {"num_attention_heads": 2, "attention_head_dim": W // 2}
MODELS = {
    "flux": (
        "FluxTransformer2DModel",
        HEADS
        | {
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 8,
            "pooled_projection_dim": 8,
            "axes_dims_rope": (8, 12, 12),
        },
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        HEADS
        | {
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 8,
            "in_channels": 16,
            "axes_dims_rope": (8, 8, 8, 8),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        HEADS
        | {
            "num_layers": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": W,
            "pooled_projection_dim": 8,
            "sample_size": 8,
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "dim": W,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 8,
            "axes_dims": [8, 12, 12],
            "axes_lens": [8, 8, 8],
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "hidden_size": W,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "cap_feat_dim": 8,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (8, 8, 8),
        },
    ),
    "qwen-image": (
        "QwenImageTransformer2DModel",
        HEADS | {"num_layers": 1, "joint_attention_dim": 8, "axes_dims_rope": (8, 12, 12)},
    ),
    "wan2.1": ("WanTransformer3DModel", HEADS | {"num_layers": 2, "ffn_dim": W, "text_dim": 8, "freq_dim": 8}),
}


def expert_of(family: str, seed: int = 0, rank: int = 3, alpha: float = 6.0, **info) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        f"lora_unet_{name}": LoraLayer(
            torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator), alpha
        )
        for name, (rows, columns) in NATIVE[family].items()
    }
    return Expert(layers, ExpertInfo(categories=("violence",), **info), family)


@pytest.mark.parametrize("family", NATIVE)
def test_the_parts_are_the_rows_of_the_whole(family):
    expert = expert_of(family)
    parts = iter(diffusers_layers(expert).values())
    for layer in expert.layers.values():
        ups, rows = [], 0
        while rows < layer.weight_shape[0]:
            part = next(parts)
            assert torch.equal(part.down, layer.down) and part.scale == layer.scale
            ups.append(part.up)
            rows += len(part.up)
        assert torch.equal(torch.cat(ups), layer.up)
    assert next(parts, None) is None


@pytest.mark.parametrize("family", NATIVE)
def test_a_family_is_known_by_its_metadata_and_by_its_shapes(family):
    named = expert_of(family, base_checkpoint=CheckpointId(family=family))
    assert native_family(named) == native_family(expert_of(family)) == family


@pytest.mark.parametrize("family", MODELS)
def test_diffusers_own_model_takes_every_layer_and_changes_by_the_whole(family, tmp_path):
    import diffusers

    name, config = MODELS[family]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    expert = expert_of(family)
    save_expert(expert, tmp_path / "native.safetensors")
    converted = tmp_path / "diffusers.safetensors"
    assert run(["convert", str(tmp_path / "native.safetensors"), "--to", "diffusers", "--out", str(converted)]) == 0
    model = getattr(diffusers, name)(**config).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = read_tensors(converted)[0]
    model.load_lora_adapter(tensors, prefix="transformer")
    model.fuse_lora()
    model.unload_lora()

    changed = {
        key.removesuffix(".weight"): value - before[key]
        for key, value in model.state_dict().items()
        if not torch.equal(value, before[key])
    }
    parts = diffusers_layers(expert)
    assert changed.keys() == parts.keys()
    for path, change in changed.items():
        assert_close_at_scale(change, parts[path].delta())


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_experts_of_both_ways_merge_by_weight(family):
    native = expert_of(family, base_checkpoint=CheckpointId(family=family))
    (split,) = in_one_spelling([expert_of(family, seed=1), by_checkpoint(family)])[:1]
    merged = merge_experts(
        [native, by_checkpoint(family), expert_of(family, seed=1)], "linear", weights=[1.0, 2.0, 0.5]
    )
    whole = merge_experts([native, expert_of(family, seed=1)], "linear", weights=[1.0, 0.5])
    (expected,) = in_one_spelling([whole, by_checkpoint(family)])[:1]
    assert merged.layers.keys() == expected.layers.keys() == split.layers.keys()
    checkpoint = by_checkpoint(family).layers
    for name, layer in merged.layers.items():
        other = 2 * checkpoint[name].delta() if name in checkpoint else 0
        assert_close_at_scale(layer.delta(), expected.layers[name].delta() + other)
    assert [sum(block.ranks.values()) for block in rank_blocks(merged)]  # they add up to every layer's rank
    assert merged.info.origin.parents[0].tensors_sha256 == native.tensors_sha256()


def by_checkpoint(family: str) -> Expert:
    """Return an expert as `train --model` of an all-in-one checkpoint writes it."""
    generator = torch.Generator().manual_seed(7)
    names = [
        f"lora_transformer_transformer_blocks_0_attn_{part}" for part in ("to_q", "to_v", "add_k_proj", "to_out_0")
    ]
    layers = {
        name: LoraLayer(torch.randn(2, W, generator=generator), torch.randn(W, 2, generator=generator), 2.0)
        for name in names
    }
    return Expert(layers, ExpertInfo(categories=("hate",), base_checkpoint=CheckpointId(family=family)), "checkpoint")


def test_what_cannot_be_split_is_named(tmp_path, capsys):
    strange = Expert({"lora_unet_double_blocks_0_img_attn_other": LoraLayer(torch.ones(1, 4), torch.ones(4, 1), 1.0)})
    named = Expert(
        dict(expert_of("flux").layers) | strange.layers, ExpertInfo(base_checkpoint=CheckpointId(family="flux"))
    )
    with pytest.raises(InputError, match="img_attn_other has no place in diffusers' model of flux"):
        diffusers_layers(named)
    save_expert(by_checkpoint("flux"), tmp_path / "e.safetensors")
    words = ["convert", str(tmp_path / "e.safetensors"), "--to", "diffusers", "--out", str(tmp_path / "d.safetensors")]
    assert run(words) == 2
    assert "diffusers reads these names as they are" in capsys.readouterr().err
    assert load_expert(tmp_path / "e.safetensors") and not (tmp_path / "d.safetensors").exists()
