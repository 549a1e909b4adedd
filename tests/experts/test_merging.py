from dataclasses import replace

import pytest
import torch
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.errors import InputError
from safety_experts.experts.blocks import rank_blocks, scale_categories
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import METHODS, merge_experts

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


def three_experts(make_expert):
    """Mixed ranks and alphas; the last one lacks the convolution."""
    return [
        make_expert(1, rank=4, alpha=2, categories=["violence"]),
        make_expert(2, rank=3, alpha=5, categories=["hate", "harassment"]),
        make_expert(3, rank=6, categories=["shocking"], layers=(LINEAR,)),
    ]


def random_counts(experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = {name: layer.up.shape[0] for expert in experts for name, layer in expert.layers.items()}
    counts = {name: torch.randint(1, 1 << 30, (len(experts), num), generator=generator) for name, num in rows.items()}
    for name, values in counts.items():  # who lacks a layer is never active there
        values[[index for index, expert in enumerate(experts) if name not in expert.layers]] = 0
    return counts


def assert_same_change(first: Expert, second: Expert, atol=1e-5):
    assert first.layers.keys() == second.layers.keys()
    for name, layer in first.layers.items():
        assert torch.allclose(layer.delta(), second.layers[name].delta(), atol=atol), name


def test_worked_number_of_the_weighted_sum():
    """ΔW_1 = 2/1 · [[1], [2]] @ [[3, 4]] = [[6, 8], [12, 16]], ΔW_2 = [[10, 0], [0, 0]];
    0.5 ΔW_1 + 2 ΔW_2 = [[23, 4], [6, 8]]."""
    first = Expert({"lora_unet_x": LoraLayer(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]]), 2.0)})
    second = Expert({"lora_unet_x": LoraLayer(torch.tensor([[5.0, 0.0]]), torch.tensor([[2.0], [0.0]]), 1.0)})
    merged = merge_experts([first, second], "linear", weights=[0.5, 2.0])
    layer = merged.layers["lora_unet_x"]
    assert layer.delta().tolist() == [[23.0, 4.0], [6.0, 8.0]]
    assert (layer.rank, layer.alpha) == (2, 2.0)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.is_exact])
def test_merge_of_one_expert_is_the_identity_to_the_bit(make_expert, method):
    expert = make_expert(rank=4, alpha=3)
    merged = merge_experts([expert], method)
    for name, layer in expert.layers.items():
        assert torch.equal(merged.layers[name].delta(), layer.delta())


def test_linear_equals_the_dense_sum_for_mixed_ranks_and_alphas(make_expert, dense):
    experts = three_experts(make_expert)
    merged = merge_experts(experts, "linear", weights=[1.0, -0.5, 2.0])
    expected = dense(experts[0], LINEAR) - 0.5 * dense(experts[1], LINEAR) + 2.0 * dense(experts[2], LINEAR)
    error = (merged.layers[LINEAR].delta() - expected).norm() / expected.norm()
    assert error < 1e-6
    expected = dense(experts[0], CONV) - 0.5 * dense(experts[1], CONV)
    assert (merged.layers[CONV].delta() - expected).norm() / expected.norm() < 1e-6
    assert merged.layers[LINEAR].rank == 4 + 3 + 6
    assert merged.layers[CONV].scale == 1.0


def test_row_co_merge_equals_the_dense_row_selection(make_expert, dense):
    experts = three_experts(make_expert)[:2]
    counts = random_counts(experts)
    weights = [1.0, 1.5]
    merged = merge_experts(experts, "co-merge", weights=weights, activation_counts=counts)
    for name in (LINEAR, CONV):
        expected = torch.stack(
            [
                weights[k] * dense(experts[k], name)[row]
                for row in range(counts[name].shape[1])
                for k in [max(range(2), key=lambda k: (counts[name][k, row].item(), -k))]
            ]
        )
        assert (merged.layers[name].delta() - expected).norm() / expected.norm() < 1e-6


def test_row_ties_go_to_the_earlier_expert_and_dead_rows_are_zero(make_expert):
    experts = [make_expert(1, layers=(LINEAR,)), make_expert(2, layers=(LINEAR,))]
    counts = torch.full((2, 12), 3)
    counts[1, 4] = 5
    counts[:, 7] = 0
    delta = merge_experts(experts, "co-merge", activation_counts={LINEAR: counts}).layers[LINEAR].delta()
    first, second = (expert.layers[LINEAR].delta() for expert in experts)
    assert torch.equal(delta[4], second[4])
    assert torch.equal(delta[7], torch.zeros(10))
    assert torch.equal(delta[[0, 1, 2, 3, 5, 6, 8, 9, 10, 11]], first[[0, 1, 2, 3, 5, 6, 8, 9, 10, 11]])


def test_an_expert_that_wins_no_row_takes_no_rank(make_expert):
    experts = [make_expert(1, rank=4, layers=(LINEAR,)), make_expert(2, rank=3, layers=(LINEAR,))]
    merged = merge_experts(experts, "co-merge", activation_counts={LINEAR: torch.tensor([[0] * 12, [9] * 12])})
    assert merged.layers[LINEAR].rank == 3
    assert [block.ranks for block in rank_blocks(merged)] == [{}, {LINEAR: 3}]


def test_strength_zero_equals_the_sum_without_the_expert(make_expert):
    experts = three_experts(make_expert)
    dialled = scale_categories(merge_experts(experts, "linear"), {"violence": 0.0})
    assert_same_change(dialled, merge_experts(experts, "linear", weights=[0.0, 1.0, 1.0]))


def test_strength_zero_after_co_merge_clears_the_rows_the_expert_won(make_expert):
    experts = three_experts(make_expert)
    counts = random_counts(experts)
    dialled = scale_categories(merge_experts(experts, "co-merge", activation_counts=counts), {"violence": 0.0})
    delta = dialled.layers[LINEAR].delta()
    full = merge_experts(experts, "co-merge", activation_counts=counts).layers[LINEAR].delta()
    won = counts[LINEAR].argmax(dim=0) == 0
    assert won.any() and not won.all()
    assert torch.equal(delta[won], torch.zeros_like(delta[won]))
    assert torch.allclose(delta[~won], full[~won], atol=1e-5)


def test_blocks_of_merged_parents_are_kept(make_expert, tmp_path):
    experts = three_experts(make_expert)
    inner = merge_experts(experts[:2], "linear", name="inner")
    save_expert(inner, tmp_path / "inner.safetensors")
    outer = merge_experts([load_expert(tmp_path / "inner.safetensors"), experts[2]], "linear", weights=[2.0, 1.0])
    assert [(block.name, block.categories) for block in rank_blocks(outer)] == [
        ("expert_1", ("violence",)),
        ("expert_2", ("hate", "harassment")),
        ("expert_3", ("shocking",)),
    ]
    dialled = scale_categories(outer, {"violence": 0.0, "shocking": 3.0})
    assert_same_change(dialled, merge_experts(experts, "linear", weights=[0.0, 2.0, 3.0]))


def test_the_merge_says_where_it_comes_from(make_expert, tmp_path):
    experts = three_experts(make_expert)[:2]
    toy = CheckpointId(name="toy", sha256="1", family="sd15")
    for expert in experts:
        info = expert.info.model_copy(update={"base_checkpoint": toy})
        save_expert(replace(expert, info=info), tmp_path / f"{expert.name}.safetensors")
    loaded = [load_expert(tmp_path / f"{expert.name}.safetensors") for expert in experts]
    info = merge_experts(loaded, "linear", weights=[1.0, 0.25]).info
    assert info.categories == ("violence", "hate", "harassment")
    assert info.origin.method == "linear"
    assert info.base_checkpoint == toy
    assert [(parent.name, parent.weight) for parent in info.parents] == [("expert_1", 1.0), ("expert_2", 0.25)]
    assert info.parents[0].sha256 == loaded[0].file_sha256


def test_experts_of_different_models_are_merged_with_a_warning(make_expert, caplog):
    experts = [make_expert(1), make_expert(2)]
    infos = [ExpertInfo(base_checkpoint=CheckpointId(name=name, sha256=name)) for name in ("one", "two")]
    experts = [replace(expert, info=info) for expert, info in zip(experts, infos, strict=True)]
    assert merge_experts(experts, "linear").info.base_checkpoint == CheckpointId()
    assert "trained on different models: one, two" in caplog.text


def test_saved_merge_loads_with_its_blocks(make_expert, tmp_path):
    experts = three_experts(make_expert)
    merged = merge_experts(experts, "co-merge", activation_counts=random_counts(experts))
    save_expert(merged, tmp_path / "m.safetensors")
    loaded = load_expert(tmp_path / "m.safetensors")
    assert rank_blocks(loaded) == rank_blocks(merged)
    assert_same_change(loaded, merged, atol=0.0)


def test_progress_counts_layers(make_expert):
    seen = []
    merge_experts([make_expert(1)], "linear", on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_experts_of_different_shapes_are_named(make_expert):
    good, other = make_expert(1), make_expert(2)
    layer = other.layers[LINEAR]
    other.layers[LINEAR] = LoraLayer(torch.zeros(4, 8), layer.up, 4.0)
    with pytest.raises(InputError, match=r"to_q is \[12, 10\] in expert_1 but \[12, 8\] in expert_2; .*model family"):
        merge_experts([good, other], "linear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "nonsense"}, "no merge method 'nonsense'; choose one of linear, average"),
        ({"method": "linear", "weights": [1.0]}, "1 weights for 2 experts"),
        ({"method": "linear", "weights": [1.0, float("nan")]}, r"weights \[1.0, nan\] must be finite"),
        ({"method": "linear", "parameters": {"density": 1}}, "linear has no parameter 'density'"),
        ({"method": "co-merge"}, "co-merge needs activation statistics"),
        ({"method": "co-merge", "activation_counts": {}}, "the statistics have no layer lora_unet"),
        (
            {"method": "co-merge", "activation_counts": {LINEAR: torch.ones(3, 12)}},
            r"are \[3, 12\], expected \[2, 12\]",
        ),
        (
            {"method": "co-merge", "activation_counts": {LINEAR: torch.zeros(2, 12)}},
            "nothing is left of expert_1, expert_2",
        ),
    ],
)
def test_wrong_arguments_are_one_line(make_expert, arguments, message):
    experts = [make_expert(1, layers=(LINEAR,)), make_expert(2, layers=(LINEAR,))]
    with pytest.raises(InputError, match=message):
        merge_experts(experts, **arguments)


def test_merging_nothing_is_refused():
    with pytest.raises(InputError, match="nothing to merge"):
        merge_experts([], "linear")
