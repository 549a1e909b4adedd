from dataclasses import replace

import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.experts.blocks import known_categories, rank_blocks, scale_categories
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.info import ExpertInfo, RankBlockEntry
from safety_experts.experts.merging import merge_experts


def test_strength_one_everywhere_returns_the_same_tensors(make_expert):
    merged = merge_experts([make_expert(1, categories=["hate"]), make_expert(2)], "linear")
    scaled = scale_categories(merged, {"hate": 1.0})
    assert all(scaled.layers[name].up is merged.layers[name].up for name in merged.layers)


def test_an_expert_without_blocks_is_one_block(make_expert):
    expert = make_expert(categories=["hate", "violence"])
    assert known_categories(expert) == ["hate", "violence"]
    scaled = scale_categories(expert, {"hate": 0.0})  # the mean of 0 and the default 1
    for name, layer in expert.layers.items():
        assert torch.allclose(scaled.layers[name].delta(), 0.5 * layer.delta(), atol=1e-5)


def test_default_strength_reaches_blocks_without_categories(make_expert):
    expert = make_expert(categories=[])
    scaled = scale_categories(expert, {}, default=0.25)
    name, layer = next(iter(expert.layers.items()))
    assert torch.allclose(scaled.layers[name].delta(), 0.25 * layer.delta(), atol=1e-5)


def test_worked_number_of_two_blocks():
    """B = [[1, 2]], A = I, blocks of rank 1 each: strengths 3 and 0.5 give ΔW = [[3, 1]]."""
    layer = LoraLayer(torch.eye(2), torch.tensor([[1.0, 2.0]]), 2.0)
    blocks = [
        RankBlockEntry(name="a", categories=("hate",), rank=1),
        RankBlockEntry(name="b", categories=("sexual",), rank=1),
    ]
    expert = Expert({"lora_unet_x": layer}, ExpertInfo(categories=("hate", "sexual"), rank_blocks=blocks))
    scaled = scale_categories(expert, {"hate": 3.0, "sexual": 0.5})
    assert scaled.layers["lora_unet_x"].delta().tolist() == [[3.0, 1.0]]
    assert scaled.info.category_strengths == {"hate": 3.0, "sexual": 0.5}
    again = scale_categories(scaled, {"hate": 2.0})
    assert again.info.category_strengths == {"hate": 6.0, "sexual": 0.5}


def test_unknown_category_is_named_with_the_known_ones(make_expert):
    with pytest.raises(InputError, match="expert_0 has no category 'gore'; it has violence"):
        scale_categories(make_expert(), {"gore": 1.0})


def test_blocks_that_do_not_add_up_are_refused(make_expert):
    blocks = (RankBlockEntry(name="a", rank=3),)
    expert = replace(make_expert(rank=4), info=ExpertInfo(rank_blocks=blocks))
    with pytest.raises(InputError, match=r"rank blocks add up to 3 in layer lora_unet.* whose rank is 4"):
        rank_blocks(expert)
