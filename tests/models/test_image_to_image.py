"""Drawing that starts from an image, against diffusers' image-to-image pipeline."""

import pytest
import torch
from closeness import assert_close_at_scale
from safety_experts.models.denoiser import StartImage, UNetDenoiser
from tiny_models import tiny_unet

ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)  # Stable Diffusion's
IMAGE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@torch.no_grad()
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_unet_draws_what_diffusers_pipeline_draws(unet, prediction_type, karras):
    import diffusers

    texts = torch.randn(2, 7, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(
        vae=diffusers.AutoencoderTiny(),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
            use_karras_sigmas=karras,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=texts[:1],
        negative_prompt_embeds=texts[1:],
        image=IMAGE,
        strength=0.8,  # 8 of 10 steps
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
    ).images

    noise = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(5))
    denoiser = UNetDenoiser(unet, ALPHAS, prediction_type)
    ours = denoiser.sample(
        noise, {"hidden_states": texts}, 8, 3.0, use_karras_sigmas=karras, start=StartImage(IMAGE, 0.8)
    )

    assert (ours - IMAGE).std() > 0.1
    assert_close_at_scale(ours, theirs)


def test_the_less_is_drawn_anew_the_more_of_the_image_stays(unet):
    noise = torch.randn(IMAGE.shape, generator=torch.Generator().manual_seed(5))
    texts = {"hidden_states": torch.zeros(2, 7, unet.config.cross_attention_dim)}
    denoiser = UNetDenoiser(unet, ALPHAS, "epsilon")
    with torch.no_grad():
        distances = [
            float((denoiser.sample(noise, texts, 4, 1.0, start=StartImage(IMAGE, denoise)) - IMAGE).norm())
            for denoise in (0.05, 0.3, 0.7)
        ]
    assert distances == sorted(distances) and distances[0] < distances[2] / 2
