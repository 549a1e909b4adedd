import pytest
import torch
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.experts.blocks import scale_categories
from safety_experts.experts.co_merge import save_activation_counts
from safety_experts.experts.expert import LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.merging import METHODS, merge_experts
from safety_experts.experts.reproduction import reproduce_merge

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def parents(make_expert, tmp_path):
    """Two saved experts of one linear layer, in a folder of their own."""
    (tmp_path / "parents").mkdir()
    loaded = []
    for seed, category in ((1, "hate"), (2, "violence")):
        path = tmp_path / "parents" / f"{category}.safetensors"
        save_expert(make_expert(seed, categories=[category], layers=(LINEAR,)), path)
        loaded.append(load_expert(path))
    return loaded


def files(tmp_path):
    return sorted((tmp_path / "parents").glob("*.safetensors"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_reproduced_to_the_bit(parents, tmp_path, method):
    counts = {LINEAR: torch.randint(1, 99, (2, 12), generator=torch.Generator().manual_seed(0))}
    merged = merge_experts(parents, method, weights=[1.0, 0.3], activation_counts=counts)
    save_expert(merged, tmp_path / "merged.safetensors")
    save_activation_counts(tmp_path / "counts.safetensors", counts, parents, {})
    statistics = tmp_path / "counts.safetensors" if METHODS[method].needs_counts else None
    result = reproduce_merge(tmp_path / "merged.safetensors", files(tmp_path)[::-1], statistics)
    assert (result.is_identical, result.relative_error) == (True, 0.0)


def test_parents_are_found_beside_the_merge_and_strengths_count(parents, tmp_path):
    merged = scale_categories(merge_experts(parents, "linear"), {"hate": 0.5})
    save_expert(merged, tmp_path / "parents" / "merged.safetensors")
    assert reproduce_merge(tmp_path / "parents" / "merged.safetensors").is_identical


def test_a_file_that_was_changed_is_found_out(parents, tmp_path, capsys):
    merged = merge_experts(parents, "linear")
    path = str(tmp_path / "parents" / "merged.safetensors")
    save_expert(merged, path)
    assert run(["reproduce", path]) == 0
    assert "every bit the same" in capsys.readouterr().out
    layer = merged.layers[LINEAR]
    merged.layers[LINEAR] = LoraLayer(layer.down, layer.up * 1.01, layer.alpha)
    save_expert(merged, path)
    assert run(["reproduce", path]) == 1
    assert "is not the merge that its metadata describes: layer lora_unet" in capsys.readouterr().err
    merged.layers[LINEAR] = LoraLayer(layer.down, layer.up * (1 + 1e-6), layer.alpha)
    save_expert(merged, path)
    assert run(["reproduce", path]) == 0
    assert "up to rounding" in capsys.readouterr().out


def test_what_is_missing_is_named(parents, make_expert, tmp_path):
    save_expert(merge_experts(parents, "linear"), tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match=r"its parent hate \(sha256 [0-9a-f]{12}\) is missing; give its file"):
        reproduce_merge(tmp_path / "merged.safetensors")
    save_expert(make_expert(9, layers=(LINEAR,)), files(tmp_path)[0])
    with pytest.raises(InputError, match=r"its parent hate .* has changed since"):
        reproduce_merge(tmp_path / "merged.safetensors", files(tmp_path))
    with pytest.raises(InputError, match="is no merge"):
        reproduce_merge(files(tmp_path)[0])


def test_statistics_must_be_those_of_the_merge(parents, tmp_path):
    counts = {LINEAR: torch.tensor([[1] * 12, [2] * 12])}
    save_expert(merge_experts(parents, "co-merge", activation_counts=counts), tmp_path / "merged.safetensors")
    with pytest.raises(InputError, match="was merged by activation statistics; give the file with --statistics"):
        reproduce_merge(tmp_path / "merged.safetensors", files(tmp_path))
    save_activation_counts(tmp_path / "other.safetensors", {LINEAR: counts[LINEAR] + 1}, parents, {})
    with pytest.raises(InputError, match=r"other\.safetensors holds other counts"):
        reproduce_merge(tmp_path / "merged.safetensors", files(tmp_path), tmp_path / "other.safetensors")
