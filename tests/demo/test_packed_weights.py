"""Packed weights: rounding error, exact re-reading, and damaged files."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from safety_experts.demo.packed_weights import load_packed, round_rows, save_packed, scale_rows
from safety_experts.errors import InputError


def test_rounding_errs_by_at_most_half_a_step_of_each_rows_deviation():
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 16).view(
        -1, 1, 1, 1
    )
    codes, scale = round_rows(weight, step=0.2)
    assert codes.dtype == torch.int8
    error = (scale_rows(codes, scale) - weight).flatten(1).abs().amax(1)
    deviation = weight.flatten(1).square().mean(1).sqrt()
    assert (error <= 0.101 * deviation).all()


def test_an_outlier_and_a_row_of_zeros_are_kept():
    weight = torch.zeros(2, 1000)
    weight[0, 0] = 5.0
    codes, scale = round_rows(weight, step=0.2)
    assert torch.allclose(scale_rows(codes, scale), weight, atol=5e-3)


def test_a_file_is_read_back_as_rounded(tmp_path):
    generator = torch.Generator().manual_seed(1)
    state = {"layer.weight": torch.randn(4, 6, generator=generator), "layer.bias": torch.randn(4, generator=generator)}
    save_packed(tmp_path / "w.safetensors", {"unet": (state, 0.1)}, {"note": "kept"})
    parts, metadata = load_packed(tmp_path / "w.safetensors")
    assert metadata == {"note": "kept"}
    assert torch.equal(parts["unet"]["layer.bias"], state["layer.bias"].half())
    assert torch.equal(parts["unet"]["layer.weight"], scale_rows(*round_rows(state["layer.weight"], 0.1)).half())


def test_normal_weights_cost_little_more_than_their_entropy(tmp_path):
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(2))
    save_packed(tmp_path / "w.safetensors", {"unet": ({"weight": weight}, 0.2)}, {})
    # log2(sqrt(2 pi e) / 0.2) = 4.37 bits a weight for a normal distribution
    assert (tmp_path / "w.safetensors").stat().st_size * 8 / weight.numel() < 4.45


def test_damaged_codes_are_reported_with_the_tensors_name(tmp_path):
    path = tmp_path / "w.safetensors"
    save_packed(path, {"unet": ({"weight": torch.randn(4, 6)}, 0.1)}, {})
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors["unet.weight"] = tensors["unet.weight"][:-4].clone()
    save_file(tensors, path, metadata)
    with pytest.raises(InputError, match=r"unet\.weight: damaged"):
        load_packed(path)


def test_another_safetensors_file_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a packed weights file"):
        load_packed(tmp_path / "other.safetensors")
