"""The bench model's training: pieces give what one run gives, and its parts can be packed at any time."""

import pytest
import torch
from safetensors import safe_open
from safety_experts.demo import train_bench
from safety_experts.demo.bench_model import LAYOUT
from safety_experts.models.unet_keys import unet_config


@pytest.fixture(autouse=True)
def _small_unet(monkeypatch):
    from diffusers import UNet2DConditionModel

    config = {**unet_config(LAYOUT), "block_out_channels": (32, 32)}
    monkeypatch.setattr(train_bench, "new_unet", lambda layout: UNet2DConditionModel(**config))


@pytest.fixture(scope="module")
def part():
    """Latents and texts as a shard has them."""
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 2, 4, 16, 16, generator=draws).half()
    return latents, torch.randn(7, 77, 768, generator=draws).bfloat16()


def _run(folder, part, steps, total=8):
    training = train_bench.Training(folder)
    for _ in range(steps):
        training.take_step(*part, total)
    training.save()
    return training


@pytest.mark.slow
def test_a_training_in_pieces_is_the_training_in_one_piece(tmp_path, part):
    whole = _run(tmp_path / "whole", part, 6)
    for steps in (1, 3, 2):
        pieces = _run(tmp_path / "pieces", part, steps)
    assert pieces.step == whole.step == 6
    for name, weight in whole.weights.items():
        assert torch.equal(weight, pieces.weights[name]), name
        assert torch.equal(whole.average[name], pieces.average[name]), name
    # It did train, and the average follows behind.
    fresh = train_bench.Training(tmp_path / "fresh")
    assert any(not torch.equal(weight, fresh.weights[name]) for name, weight in whole.weights.items())
    assert any(not torch.equal(weight, whole.average[name]) for name, weight in whole.weights.items())


def test_a_save_that_fails_leaves_the_last_state(tmp_path, part, monkeypatch):
    _run(tmp_path, part, 1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    training = train_bench.Training(tmp_path)
    training.take_step(*part, 8)
    monkeypatch.setattr(train_bench, "save_file", fail)
    with pytest.raises(Exception, match="disk full"):
        training.save()
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "1"


def test_the_rate_rises_stays_and_falls_to_nothing():
    rates = [train_bench.learning_rate(step, 4000) for step in range(4000)]
    peak = train_bench.PEAK_RATE
    assert rates[0] == pytest.approx(peak / train_bench.WARMUP)
    assert rates[200] == rates[2999] == peak
    assert rates[3500] == pytest.approx(peak / 2)
    assert rates[3999] == pytest.approx(peak / 1000)
    # Up to the fall the length of the whole does not matter, so it may be changed.
    assert train_bench.learning_rate(1000, 8000) == rates[1000]


def test_crops_are_parts_of_scenes():
    crops = train_bench.render_crops(8)
    assert crops.shape == (8, 3, 64, 64)
    assert crops.dtype == torch.uint8
    assert len({tuple(crop.flatten()[::97].tolist()) for crop in crops}) > 4
