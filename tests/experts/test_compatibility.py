"""LoRAs of different models are told apart by their layers, where their metadata say nothing."""

from dataclasses import replace

import pytest
import torch
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.errors import InputError
from safety_experts.experts.compatibility import possible_families
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import merge_experts

BLOCK = "lora_unet_{}_attentions_0_transformer_blocks_{}_{}"


def lora(name: str, layers: dict[str, tuple[int, int]], family: str = "") -> Expert:
    made = {key: LoraLayer(torch.ones(1, width), torch.ones(out, 1), 1.0) for key, (out, width) in layers.items()}
    return Expert(made, ExpertInfo(base_checkpoint=CheckpointId(family=family)), name=name)


SD15 = lora("old", {BLOCK.format("down_blocks_0", 0, "attn2_to_k"): (320, 768)})
SDXL = lora("new", {BLOCK.format("down_blocks_2", 3, "attn1_to_q"): (1280, 1280)})
SDXL_TEXT = lora("new_text", {BLOCK.format("mid_block", 0, "attn2_to_v"): (1280, 2048)})
SD3 = lora("sd3", {"lora_transformer_transformer_blocks_0_attn_to_q": (1536, 1536)})
FLUX = lora("flux", {"lora_transformer_single_transformer_blocks_0_attn_to_q": (3072, 3072)})


@pytest.mark.parametrize(
    ("expert", "families"),
    [
        (SD15, {"sd15"}),
        (SDXL, {"sdxl"}),
        (SDXL_TEXT, {"sdxl"}),
        (SD3, {"sd3", "flux"}),
        (FLUX, {"flux"}),
        (lora("native_sd3", {"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)}), {"sd3"}),
        (lora("named", {"lora_unet_blocks_0_attn_wq": (8, 8)}, "krea2"), {"krea2"}),
    ],
)
def test_layers_tell_the_family(expert, families):
    assert possible_families(expert) == families


NATIVE = lora("z", {"lora_unet_layers_0_attention_qkv": (30, 10)})


@pytest.mark.parametrize("other", [SDXL, SDXL_TEXT, FLUX, NATIVE], ids=lambda expert: expert.name)
def test_a_merge_refuses_loras_without_a_layer_in_common_that_are_of_two_models(other):
    with pytest.raises(
        InputError, match=f"old is made for sd15 but {other.name} for .*; only LoRAs of one model family"
    ):
        merge_experts([SD15, other], "linear")


def test_what_the_metadata_say_counts_and_a_layer_of_two_shapes_is_refused():
    toy = {BLOCK.format("mid_block", 0, "attn1_to_q"): (8, 8)}
    first, second = (
        replace(lora(family, toy), info=ExpertInfo(base_checkpoint=CheckpointId(family=family, name=family)))
        for family in ("sd15", "sdxl")
    )
    with pytest.raises(InputError, match="sd15 is made for sd15 but sdxl for sdxl"):
        merge_experts([first, second], "linear")
    merge_experts([first, lora("unknown", toy)], "linear")
    with pytest.raises(InputError, match=r"layer lora_unet_mid.* is \[8, 8\] in sd15 but \[4, 8\] in wide"):
        merge_experts([first, lora("wide", {next(iter(toy)): (4, 8)})], "linear")
