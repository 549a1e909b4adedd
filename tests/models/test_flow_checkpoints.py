"""SD3 and FLUX.1 checkpoints: every part read from one file or a folder, against diffusers; a step of training."""

import numpy as np
import pytest
import small_checkpoints as small
import small_flow_checkpoints as flow
import torch
from closeness import assert_close_at_scale
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.experts.expert_file import load_expert
from safety_experts.experts.keys import comfyui_matches
from safety_experts.experts.merging import merge_experts
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.models.denoiser import StartImage
from safety_experts.models.flux import Flux
from safety_experts.models.sd3 import SD3
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.tensor_file import read_tensors
from safety_experts.training.events import TrainingEvents
from safety_experts.training.recipe import Recipe
from safety_experts.training.trainer import train_expert

PROMPTS = ["", "a red circle with thorns"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return flow.write_tokenizers(tmp_path_factory.mktemp("comfy"))


@pytest.fixture(scope="module", params=["sd3", "flux"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def weights(family):
    return flow.checkpoint_weights(family)


@pytest.fixture(scope="module")
def single(weights, tokenizer_folder, tmp_path_factory):
    path = small.write(tmp_path_factory.mktemp("single") / "small.safetensors", weights)
    return load_checkpoint(path, tokenizer_folder=tokenizer_folder)


@pytest.fixture(scope="module")
def pipeline(single, family):
    """A diffusers pipeline of the same weights. The CLIPs come from our loader (see test_checkpoint.py)."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    encoder = single.load_text_encoder()
    clip_l, tokenizer = encoder.towers[0].model, encoder.towers[0].tokenizer
    tokenizer.model_max_length, tokenizer.pad_token = 77, "<|endoftext|>"
    t5_tokenizer = encoder.t5.tokenizer
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    if family == "flux":
        return diffusers.FluxPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae,
            text_encoder=clip_l,
            tokenizer=tokenizer,
            text_encoder_2=encoder.t5.model,
            tokenizer_2=t5_tokenizer,
            transformer=single.load_model(),
        )
    tokenizer_g = type(tokenizer).from_pretrained(tokenizer.name_or_path, pad_token="!", model_max_length=77)
    # diffusers wants SD3's CLIP-L with a projection, which in the published model is the identity.
    projecting = CLIPTextModelWithProjection(CLIPTextConfig(**clip_l.config.to_dict() | {"projection_dim": 64})).eval()
    state = {key if key.startswith("text_model.") else f"text_model.{key}": w for key, w in clip_l.state_dict().items()}
    projecting.load_state_dict(state | {"text_projection.weight": torch.eye(64)})
    return diffusers.StableDiffusion3Pipeline(
        transformer=single.load_model(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=projecting,
        tokenizer=tokenizer,
        text_encoder_2=encoder.towers[1].model,
        tokenizer_2=tokenizer_g,
        text_encoder_3=encoder.t5.model,
        tokenizer_3=t5_tokenizer,
    )


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory, tokenizer_folder):
    path = tmp_path_factory.mktemp("folder")
    pipeline.save_pretrained(path)
    return load_checkpoint(path)


# --- one file ---


def test_the_family_and_its_schedule_are_recognised(single, family):
    assert (single.family, single.prediction_type) == (family, "flow")
    assert single.noise.shift == pytest.approx({"sd3": 3.0, "flux": 3.158193}[family])


def test_schnell_has_no_guidance_and_no_shift(tmp_path):
    weights = small.random_weights(flow.flux_shapes(has_guidance=False))
    checkpoint = load_checkpoint(small.write(tmp_path / "schnell.safetensors", weights))
    assert checkpoint.noise.shift == 1.0 and not checkpoint.load_model().config.guidance_embeds


@pytest.mark.parametrize(
    ("of_family", "shapes"),
    [(SD3(), flow.sd3_shapes()), (SD3(), flow.sd3_shapes(is_sd35=True)), (Flux(), flow.flux_shapes(width=3072))],
)
def test_native_names_are_those_of_diffusers_converter(of_family, shapes):
    from diffusers.loaders import single_file_utils

    layout = of_family.infer(shapes)
    generator = torch.Generator().manual_seed(0)
    rows = {key: torch.randn(shape[:1], generator=generator) for key, shape in shapes.items()}  # it looks at rows only
    convert = getattr(single_file_utils, f"convert_{of_family.name}_transformer_checkpoint_to_diffusers")
    expected = convert({key: row if "embed" not in key else row[:, None] for key, row in rows.items()})
    assert expected.keys() == of_family.build(layout).state_dict().keys()
    for key, theirs in expected.items():
        weight = of_family.native_weight(key, layout)
        ours = rows[weight.key if weight.key in rows else weight.key.replace("_norm.weight", "_norm.scale")]
        ours = ours[weight.rows] if weight.rows else ours
        ours = torch.cat(ours.chunk(2)[::-1]) if weight.swapped else ours
        torch.testing.assert_close(ours, theirs.flatten(), rtol=0, atol=0, msg=key)


@torch.no_grad()
@pytest.mark.parametrize("shapes", [flow.sd3_shapes(is_sd35=True), flow.flux_shapes()])
def test_a_bare_transformer_opens_and_says_what_it_lacks(tmp_path, tokenizer_folder, shapes):
    path = small.write(tmp_path / "bare.safetensors", small.random_weights(shapes))
    checkpoint = load_checkpoint(path, tokenizer_folder=tokenizer_folder)
    assert sum(w.numel() for w in checkpoint.load_model().state_dict().values()) == sum(
        torch.Size(shape).numel() for shape in shapes.values()
    )
    remedy = r"bare\.safetensors holds no .* use a full checkpoint or a diffusers folder, or join the parts in ComfyUI"
    for load in (checkpoint.load_text_encoder, checkpoint.load_vae):
        with pytest.raises(InputError, match=remedy) as error:
            load()
        assert "\n" not in str(error.value)


def test_sd3_without_t5_has_clips_tokens_alone(tmp_path, tokenizer_folder):
    weights = {key: w for key, w in flow.checkpoint_weights("sd3").items() if "t5xxl" not in key}
    checkpoint = load_checkpoint(small.write(tmp_path / "a.safetensors", weights), tokenizer_folder=tokenizer_folder)
    hidden = checkpoint.load_text_encoder().encode_prompts(PROMPTS)["hidden_states"]
    assert hidden.shape == (2, 77, flow.T5_WIDTH["sd3"])
    assert hidden[..., :128].abs().amin() > 0 and not hidden[..., 128:].any()


def test_editing_models_are_refused(tmp_path):
    shapes = flow.flux_shapes() | {"img_in.weight": (128, 384)}
    with pytest.raises(InputError, match="takes 96 input channels"):
        load_checkpoint(small.write(tmp_path / "fill.safetensors", small.random_weights(shapes)))


def test_a_prediction_type_is_no_choice(single):
    with pytest.raises(InputError, match="leave prediction_type out"):
        load_checkpoint(single.path, prediction_type="epsilon")


def test_images_become_latents_by_the_shift_and_scale_of_the_family(single, family, weights):
    vae = single.load_vae()
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        raw = vae.model.encoder.layers(images)
    scale, shift = {"sd3": (1.5305, 0.0609), "flux": (0.3611, 0.1159)}[family]
    latents = vae.encode_images(images)
    assert_close_at_scale(latents, (raw / 0.3 + 0.1 - shift) * scale)
    assert latents.shape == (1, 16, 2, 2)


def test_long_prompts_are_cut_and_end(single, caplog):
    t5 = single.load_text_encoder().t5
    tokens = t5.tokenize(["red " * 300])
    assert tokens.shape == (1, t5.num_tokens) and tokens[0, -1] == 1 and (tokens[0, :-1] > 1).all()
    assert "is cut to" in caplog.text


def test_a_missing_t5_tokenizer_is_told_how_to_get_one(single, tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    clip_only = small.write_tokenizer(tmp_path / "comfy" / "sd1_tokenizer")
    with pytest.raises(InputError, match="no T5 tokenizer: set COMFYUI_PATH"):
        load_checkpoint(single.path, tokenizer_folder=clip_only).load_text_encoder()


# --- against diffusers' pipelines ---


@torch.no_grad()
def test_prompts_are_encoded_as_in_diffusers(single, pipeline, family):
    encoded = single.load_text_encoder().encode_prompts(PROMPTS)
    if family == "sd3":
        hidden, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=77
        )
    else:
        hidden, pooled, _ = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=256)
    assert_close_at_scale(encoded["hidden_states"], hidden)
    assert_close_at_scale(encoded["pooled"], pooled)


NOISE = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0))
START = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(1))


def drawn_by(pipeline, family, guidance, **options):
    """The latents a diffusers pipeline makes of NOISE."""
    pipeline.set_progress_bar_config(disable=True)
    options |= {"height": 32, "width": 48, "output_type": "latent"}
    if family == "sd3":
        return pipeline(PROMPTS[1], latents=NOISE, guidance_scale=guidance, max_sequence_length=77, **options).images
    packed = pipeline._pack_latents(NOISE, 1, 16, 4, 6)
    drawn = pipeline(PROMPTS[1], latents=packed, guidance_scale=3.5, max_sequence_length=256, **options).images
    return pipeline._unpack_latents(drawn, 32, 48, pipeline.vae_scale_factor)


@torch.no_grad()
def test_one_step_of_the_pipeline_is_our_prediction(single, pipeline, family):
    drawn = drawn_by(pipeline, family, 1.0, num_inference_steps=1)
    denoiser = single.make_denoiser(single.load_model())
    conditions = single.load_text_encoder().encode_prompts(PROMPTS[1:])
    velocity = denoiser.predict(NOISE, torch.tensor([999]), conditions)  # one step from noise level 1 to 0
    assert velocity.std() > 0.1
    assert_close_at_scale(drawn, NOISE - velocity)


@torch.no_grad()
def test_samples_are_the_pipelines(single, pipeline, family, monkeypatch):
    from diffusers import FlowMatchEulerDiscreteScheduler

    monkeypatch.setattr(pipeline, "scheduler", FlowMatchEulerDiscreteScheduler(shift=single.noise.shift))
    # Evenly spaced before the shift; left to itself, SD3's pipeline shifts twice.
    drawn = drawn_by(pipeline, family, 5.0, sigmas=[1.0, 0.75, 0.5, 0.25])
    denoiser = single.make_denoiser(single.load_model())
    conditions = single.load_text_encoder().encode_prompts(PROMPTS[::-1])
    ours = denoiser.sample(NOISE, conditions, num_steps=4)
    assert (ours - NOISE).std() > 0.1
    assert_close_at_scale(ours, drawn)


@torch.no_grad()
def test_images_from_images_are_the_pipelines(single, pipeline, family):
    import diffusers

    kind = {"sd3": diffusers.StableDiffusion3Img2ImgPipeline, "flux": diffusers.FluxImg2ImgPipeline}[family]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=single.noise.shift)
    theirs = kind(**pipeline.components | {"scheduler": scheduler})
    theirs.set_progress_bar_config(disable=True)
    drawn = theirs(
        PROMPTS[1],
        image=START,
        strength=0.5,
        sigmas=[1.0, 0.75, 0.5, 0.25],
        num_inference_steps=4,
        height=32,
        width=48,
        guidance_scale=3.5 if family == "flux" else 5.0,
        max_sequence_length=256 if family == "flux" else 77,
        generator=torch.Generator().manual_seed(0),  # NOISE's
        output_type="latent",
    ).images
    if family == "flux":
        drawn = theirs._unpack_latents(drawn, 32, 48, theirs.vae_scale_factor)
    conditions = single.load_text_encoder().encode_prompts(PROMPTS[::-1])
    denoiser = single.make_denoiser(single.load_model())
    ours = denoiser.sample(NOISE, conditions, 2, start=StartImage(START, 0.5))
    assert (ours - START).std() > 0.1
    assert_close_at_scale(ours, drawn)


@torch.no_grad()
def test_bfloat16_predicts_nearly_what_float32_does(single, family):
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (2, 9, flow.T5_WIDTH[family]), "pooled": (2, flow.POOLED_WIDTH[family])}
    conditions = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    inputs = torch.randn(2, 16, 4, 4, generator=generator), torch.tensor([5, 900]), conditions
    exact = single.make_denoiser(single.load_model()).predict(*inputs)
    rounded = single.make_denoiser(single.load_model(torch.bfloat16), torch.bfloat16).predict(*inputs)
    # A noise level rounded to bfloat16 alone makes FLUX 35% wrong here.
    assert (rounded - exact).abs().mean() < 0.03 * exact.abs().mean()


@torch.no_grad()
def test_a_folder_gives_what_the_single_file_gives(folder, single, pipeline):
    assert (folder.family, folder.prediction_type) == (single.family, "flow")
    assert folder.noise.shift == pytest.approx(single.noise.shift) and len(folder.sha256) == 64
    conditions = [part.load_text_encoder().encode_prompts(PROMPTS) for part in (folder, single)]
    torch.testing.assert_close(conditions[0], conditions[1])
    inputs = torch.randn(2, 16, 4, 4), torch.tensor([10, 900]), conditions[0]
    predicted = [part.make_denoiser(part.load_model()).predict(*inputs) for part in (folder, single)]
    torch.testing.assert_close(predicted[0], predicted[1])
    images = torch.rand(1, 3, 16, 16)
    expected = (pipeline.vae.encode(images * 2 - 1).latent_dist.mode() - 0.06) * 1.5
    torch.testing.assert_close(folder.load_vae().encode_images(images), expected)


# --- training ---


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    dataset = PreferenceDataset.create(tmp_path_factory.mktemp("data") / "pairs", DatasetInfo({}, {}, "noise", ""))
    for seed, letter in enumerate("ab"):
        pair = PromptPair(f"{letter} with thorns", letter, ("violence",), seed)
        pixels = np.random.default_rng(seed).integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
        dataset.add(pair, *(Image.fromarray(image) for image in pixels))
    return dataset


def train(checkpoint, dataset, out, tokenizer_folder, on_samples=None, **options):
    values = {"rank": 2, "steps": 2, "batch_size": 2, "accumulation_steps": 1, "precision": "fp32", "warmup_steps": 0}
    recipe = Recipe(**values, anchor_weight=1.0, **options)
    events = TrainingEvents(sample_every=2, on_samples=on_samples) if on_samples else None
    opened = load_checkpoint(checkpoint.path, tokenizer_folder=tokenizer_folder)
    return train_expert(opened, dataset, recipe, out, events=events, device="cpu")


@pytest.mark.parametrize(
    "options", [{}, {"flow_error": "x0", "anchor_samples": "noise", "gradient_checkpointing": True}]
)
def test_an_expert_is_trained_and_loads_in_stock_loaders(single, dataset, tokenizer_folder, tmp_path, options, family):
    result = train(single, dataset, tmp_path / "violence.safetensors", tokenizer_folder, **options)
    assert result.losses[0] == pytest.approx(np.log(2), abs=1e-4)  # policy and reference are one before the first step
    expert = load_expert(result.path)
    # SD3: 8 in the first block, 7 in the last, whose text stream ends there. FLUX: 8 and 3 (single).
    assert len(expert.layers) == {"sd3": 8 + 7, "flux": 8 + 3}[family]
    still = [name for name, layer in expert.layers.items() if not layer.up.any()]
    # The text stream's queries of SD3's last block lead nowhere.
    assert still == (["lora_transformer_transformer_blocks_1_attn_add_q_proj"] if family == "sd3" else [])
    assert expert.info.base_checkpoint.family == family
    assert all(comfyui_matches(key) for key in read_tensors(result.path)[0])


@pytest.mark.slow
def test_pictures_are_drawn_while_it_trains(single, dataset, tokenizer_folder, tmp_path):
    drawn = []
    train(single, dataset, tmp_path / "a.safetensors", tokenizer_folder, on_samples=drawn.append)
    assert [samples.step for samples in drawn] == [0, 2]
    pictures = [picture for samples in drawn for picture in samples.pictures.values()]
    assert len(pictures) == 4 and all(np.asarray(picture).std() > 1 for picture in pictures)


def test_a_folder_trains_too_and_experts_merge(folder, dataset, tokenizer_folder, tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(paths):
        train(folder, dataset, path, None, seed=seed)
    experts = [load_expert(path) for path in paths]
    merged = merge_experts(experts, "linear", weights=[1.0, 1.0])
    name, layer = next(iter(merged.layers.items()))
    expected = sum(expert.layers[name].delta() for expert in experts)
    assert merged.layers.keys() == experts[0].layers.keys()
    torch.testing.assert_close(layer.delta(), expected)


def test_cached_equals_uncached(single, dataset, tokenizer_folder, tmp_path):
    paths = [tmp_path / f"{name}.safetensors" for name in ("cached", "encoded")]
    train(single, dataset, paths[0], tokenizer_folder)
    cache = next(path for path in (dataset.folder / ".cache").iterdir() if single.sha256[:16] in path.name)
    cache.rename(tmp_path / "put aside")
    train(single, dataset, paths[1], tokenizer_folder)
    cached, encoded = (read_tensors(path)[0] for path in paths)
    assert cached.keys() == encoded.keys() and all(torch.equal(cached[key], encoded[key]) for key in cached)


def test_kept_reference_predictions_do_not_mix_the_two_errors(single, dataset, tokenizer_folder, tmp_path):
    for error in ("velocity", "x0"):
        path = tmp_path / f"{error}.safetensors"
        result = train(single, dataset, path, tokenizer_folder, flow_error=error, reference_epochs=1)
        assert result.losses[0] == pytest.approx(np.log(2), abs=1e-4)


def test_joint_attention_has_no_cross_attention_layers(single, dataset, tokenizer_folder, tmp_path):
    with pytest.raises(InputError, match="set targets to attention"):
        train(single, dataset, tmp_path / "a.safetensors", tokenizer_folder, targets="cross-attention")
