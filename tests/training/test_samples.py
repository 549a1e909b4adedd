"""Pictures drawn while training."""

import numpy as np
import pytest
import torch
from safety_experts.models.denoiser import SAMPLE_GUIDANCE, UNetDenoiser
from safety_experts.training.events import TrainingEvents
from safety_experts.training.samples import SampleDrawer
from small_training import SmallTraining
from tiny_models import make_pair

ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)  # Stable Diffusion's
IMAGE = torch.linspace(-1, 1, 64).view(1, 4, 4, 4)


class KnownImage(UNetDenoiser):
    """Stands for a trained model that knows one image a prompt: its prediction is exact at every noise level."""

    def __init__(self, prediction_type: str):
        super().__init__(None, ALPHAS, prediction_type)

    def predict(self, noisy, timesteps, conditions):
        alpha = ALPHAS[timesteps].view(-1, 1, 1, 1)
        image = IMAGE * conditions["hidden_states"]  # 1 and -1; 0 for the empty prompt
        noise = (noisy - alpha.sqrt() * image) / (1 - alpha).sqrt()
        return noise if self.prediction_type == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * image


class Known:
    """Checkpoint and cache of that model."""

    name = "known"

    def latents(self, pair):
        return IMAGE[0], IMAGE[0]

    def conditions(self, prompts):
        values = {"": 0.0, "a red circle with thorns 0": 1.0, "a red circle 0": -1.0}
        return {"hidden_states": torch.tensor([values[prompt] for prompt in prompts]).view(-1, 1, 1, 1)}


PROMPTS = ["a red circle with thorns 0", "a red circle 0"]


def draw(prediction_type: str, guidance: float, use_karras_sigmas: bool = False) -> torch.Tensor:
    known = Known()
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1, -1)
    conditions = known.conditions([*PROMPTS, "", ""])
    return KnownImage(prediction_type).sample(noise, conditions, 20, guidance, use_karras_sigmas)


@pytest.mark.parametrize("use_karras_sigmas", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_exact_model_draws_the_image_it_knows(prediction_type, use_karras_sigmas):
    latents = draw(prediction_type, 1.0, use_karras_sigmas)
    torch.testing.assert_close(latents, torch.cat([IMAGE, -IMAGE]), atol=0.02, rtol=0)


def test_guidance_pushes_away_from_the_empty_prompt():
    torch.testing.assert_close(draw("epsilon", SAMPLE_GUIDANCE), 5 * torch.cat([IMAGE, -IMAGE]), atol=0.1, rtol=0)


def test_the_pair_gives_the_prompts_each_once():
    drawer = SampleDrawer(Known(), Known(), make_pair(0), torch.device("cpu"))
    assert drawer.prompts == PROMPTS
    same = make_pair(0, prompt="a red circle 0")
    assert SampleDrawer(Known(), Known(), same, torch.device("cpu")).prompts == PROMPTS[1:]


def test_sampling_changes_nothing_and_comes_when_asked(tmp_path):
    small = SmallTraining.create(tmp_path)
    drawn = []
    options = ("steps=5", "ema_decay=0.5")
    watched = small.train(
        tmp_path / "a.safetensors", *options, events=TrainingEvents(sample_every=2, on_samples=drawn.append)
    )
    blind = small.train(tmp_path / "b.safetensors", *options)
    assert watched.expert.tensors_sha256() == blind.expert.tensors_sha256()
    assert watched.records == blind.records
    assert [samples.step for samples in drawn] == [0, 2, 4, 5]
    for samples in drawn:
        unsafe, safe = samples.pictures
        assert "thorns" in unsafe and "thorns" not in safe
        assert {picture.size for picture in samples.pictures.values()} == {(64, 64)}
    first, last = (np.asarray(next(iter(samples.pictures.values()))).astype(int) for samples in (drawn[0], drawn[-1]))
    assert (first != last).any()
