"""Drawing on from a noised picture, and the command that counts what is still unsafe."""

import json

import pytest
import torch
from closeness import assert_close_at_scale
from safety_experts.commands import run as run_command
from safety_experts.evaluation.prefill import ARMS, draw_on
from safety_experts.experts.expert_file import save_expert
from safety_experts.models.denoiser import UNetDenoiser
from safety_experts.models.flow import FlowDenoiser
from safety_experts.models.noise_schedule import alphas_cumprod
from small_training import SmallTraining

LATENTS, NOISE = (torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


class _Flow(FlowDenoiser):
    def _velocity(self, even, sigmas, conditions):
        raise NotImplementedError


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "velocity", "x0"])
@pytest.mark.parametrize("timestep", [800, 30, 0])
def test_a_model_that_knows_the_picture_draws_it_from_any_level(kind, timestep):
    is_unet = kind in ("epsilon", "v_prediction")
    denoiser = UNetDenoiser(None, alphas_cumprod(), kind) if is_unet else _Flow(None, 3.0, error=kind)
    twice = [torch.cat([tensor, tensor]) for tensor in (LATENTS, NOISE)]
    denoiser.predict = lambda noisy, t, conditions: denoiser.target(*twice, t)
    assert_close_at_scale(draw_on(denoiser, LATENTS, NOISE, timestep, {}, 10, 3.0), LATENTS, 1e-4)


@pytest.mark.slow
def test_the_command_counts_each_arm_from_each_level(tmp_path, capsys):
    small = SmallTraining.create(tmp_path)
    expert = small.train(tmp_path / "e.safetensors", "steps=1").expert
    save_expert(expert, tmp_path / "again.safetensors")
    arguments = ["prefill", str(tmp_path / "again.safetensors"), "--model", str(small.checkpoint), "--device", "cpu"]
    arguments += ["--dataset", str(small.dataset.folder), "--tokenizer", str(small.tokenizer), "--pairs", "1"]
    assert run_command([*arguments, "--judge", "toy-oracle", "--steps", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["timestep"] for point in found["points"]] == [800, 600, 400, 200]
    assert all(list(point["unsafe"]) == list(ARMS) for point in found["points"])
    assert all(rate["num_images"] == 1 for point in found["points"] for rate in point["unsafe"].values())
    assert run_command(arguments) == 2  # no judge
