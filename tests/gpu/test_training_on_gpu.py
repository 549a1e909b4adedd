"""The trainer and the merges on a CUDA device, against the CPU."""

import pytest
import torch
from safety_experts.errors import SafetyExpertsError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import METHODS, merge_experts
from safety_experts.training.events import TrainingEvents
from small_training import SmallTraining


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


def test_fp32_trains_what_the_cpu_trains(small, tmp_path):
    options = ("steps=4", "beta=100")
    on_cpu = small.train(tmp_path / "cpu.safetensors", *options)
    on_gpu = small.train(tmp_path / "gpu.safetensors", *options, device="cuda")
    for ours, theirs in zip(on_gpu.records, on_cpu.records, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.parametrize("overrides", [["precision=bf16"], ["precision=fp16"], ["gradient_checkpointing=true"]])
def test_every_way_to_compute_learns(small, tmp_path, overrides):
    result = small.train(tmp_path / "e.safetensors", "steps=20", *overrides, device="cuda")
    assert result.records[-1]["loss"] < result.records[0]["loss"]
    assert all(layer.up.device.type == "cpu" for layer in result.expert.layers.values())


def test_a_compiled_model_trains_the_same(small, tmp_path):
    plain = small.train(tmp_path / "a.safetensors", "steps=3", "beta=100", device="cuda")
    compiled = small.train(tmp_path / "b.safetensors", "steps=3", "beta=100", "compile=true", device="cuda")
    for ours, theirs in zip(compiled.records, plain.records, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


def test_a_resumed_run_goes_on(small, tmp_path):
    seen, out = [], tmp_path / "e.safetensors"
    events = TrainingEvents(
        on_step=seen.append, should_stop=lambda: sum(record.stage == "train" for record in seen) == 3
    )
    stopped = small.train(out, "steps=6", device="cuda", events=events)
    assert stopped.stopped and len(stopped.records) == 3
    resumed = small.train(out, "steps=6", device="cuda", resume=True)
    assert len(resumed.records) == 6 and resumed.records[:3] == stopped.records


def test_a_full_device_is_one_line(small, tmp_path):
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(int(free * 0.99), dtype=torch.uint8, device="cuda")
    with pytest.raises(SafetyExpertsError, match="memory"):
        small.train(tmp_path / "e.safetensors", "steps=2", "batch_size=512", device="cuda")
    del filler
    torch.cuda.empty_cache()


@pytest.mark.parametrize("method", METHODS)
def test_every_merge_gives_what_the_cpu_gives(method):
    generator = torch.Generator().manual_seed(0)
    layers = [
        {
            "lora_unet_x": LoraLayer(
                torch.randn(4, 48, generator=generator), torch.randn(32, 4, generator=generator), 4.0
            )
        }
        for _ in range(2)
    ]
    experts = [Expert(layer, ExpertInfo(categories=[name]), name) for layer, name in zip(layers, "ab", strict=True)]
    counts = {"lora_unet_x": torch.randint(1, 99, (2, 32), generator=generator)}
    merged = [
        merge_experts(experts, method, weights=[1.0, 0.5], activation_counts=counts, device=device)
        for device in ("cpu", "cuda")
    ]
    expected, found = (item.layers["lora_unet_x"].delta() for item in merged)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
