"""Opening checkpoints: what is recognised, what each part holds, what a wrong file is told."""

import copy
import logging

import pytest
import small_checkpoints as small
import torch
from closeness import assert_close_at_scale
from safety_experts.errors import InputError
from safety_experts.models.checkpoint import load_checkpoint
from torch import nn

UNET = "model.diffusion_model."
CLIP = "cond_stage_model.transformer."
VAE = "first_stage_model."


@pytest.fixture(scope="module")
def weights():
    return small.sd1_weights()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return small.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sd1(weights, tokenizer_folder, tmp_path_factory):
    path = small.write(tmp_path_factory.mktemp("sd1") / "small.safetensors", weights)
    return load_checkpoint(path, tokenizer_folder=tokenizer_folder)


# --- what is recognised ---


def test_a_reduced_sd1_checkpoint_is_recognised(sd1):
    assert (sd1.family, sd1.prediction_type, sd1.name) == ("sd15", "epsilon", "small.safetensors")
    assert repr(sd1) == "<sd15 checkpoint small.safetensors>"


def test_the_hash_follows_the_file(tmp_path, weights):
    path = small.write(tmp_path / "a.safetensors", weights)
    first = load_checkpoint(path).sha256
    small.write(path, weights | {"extra": torch.ones(1)})
    second = load_checkpoint(path).sha256
    assert len(first) == 64 and first != second


@pytest.mark.parametrize(
    ("extra", "expected"), [((), "epsilon"), (("v_pred",), "v_prediction"), (("v_pred", "ztsnr"), "v_prediction")]
)
def test_sdxl_says_by_a_key_that_it_predicts_velocity(tmp_path, extra, expected):
    weights = {UNET + key: value for key, value in sdxl_unet().items()} | {key: torch.zeros(0) for key in extra}
    checkpoint = load_checkpoint(small.write(tmp_path / "xl.safetensors", weights))
    assert (checkpoint.family, checkpoint.prediction_type) == ("sdxl", expected)
    last = checkpoint.noise.alphas_cumprod[-1].item()
    assert last == pytest.approx(4.897e-8 if "ztsnr" in extra else 0.0046602, rel=1e-4)


@pytest.mark.parametrize(("spread", "expected"), [(0.05, "epsilon"), (0.2, "v_prediction")])
def test_sd2_shows_by_the_spread_of_one_bias_that_it_predicts_velocity(tmp_path, spread, expected):
    weights = {UNET + key: value for key, value in linear_unet(1024).items()}
    weights[UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"] = torch.tensor([-spread, spread])
    path = small.write(tmp_path / "sd2.safetensors", weights)
    assert (load_checkpoint(path).family, load_checkpoint(path).prediction_type) == ("sd20", expected)
    assert load_checkpoint(path, prediction_type="epsilon").prediction_type == "epsilon"


def test_the_noise_schedule_is_that_of_stable_diffusion(sd1):
    from diffusers import DDPMScheduler

    oracle = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    assert sd1.noise.alphas_cumprod.dtype == torch.float32
    torch.testing.assert_close(sd1.noise.alphas_cumprod, oracle, rtol=1e-4, atol=1e-7)


def linear_unet(context_dim):
    weights = small.random_weights(small.unet_shapes(context_dim))
    return {key: value[..., 0, 0] if ".proj_" in key and value.dim() == 4 else value for key, value in weights.items()}


def sdxl_unet():
    labels = small.random_weights({"label_emb.0.0.weight": (128, 2816), "label_emb.0.2.weight": (128, 128)})
    return linear_unet(2048) | labels


# --- the UNet ---


def test_every_weight_of_a_reduced_unet_arrives(sd1, weights):
    unet = sd1.load_model()
    loaded = sorted(value.double().sum().item() for value in unet.state_dict().values())
    stored = sorted(value.double().sum().item() for key, value in weights.items() if key.startswith(UNET))
    assert len(stored) == 96
    assert loaded == stored
    assert not unet.training and not any(parameter.requires_grad for parameter in unet.parameters())


def test_a_reduced_unet_runs_and_listens_to_the_prompt(sd1):
    unet = sd1.load_model()
    generator = torch.Generator().manual_seed(0)
    noisy, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(2, 77, 768, generator=generator)
    with torch.no_grad():
        first, second = (unet(noisy, 10, encoder_hidden_states=row[None]).sample for row in context)
    assert first.shape == noisy.shape and first.isfinite().all()
    assert not torch.allclose(first, second)


def test_parts_come_in_the_precision_asked_for(sd1):
    assert {value.dtype for value in sd1.load_model(dtype=torch.bfloat16).state_dict().values()} == {torch.bfloat16}
    assert sd1.load_vae(dtype=torch.bfloat16).encode_images(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


def test_a_file_with_a_bare_unet_opens(tmp_path):
    path = small.write(tmp_path / "unet.safetensors", small.random_weights(small.unet_shapes()))
    assert load_checkpoint(path).load_model().conv_in.weight.shape == (32, 4, 3, 3)


# --- the text encoders ---


def test_clip_l_gives_what_transformers_gives(sd1, weights, tokenizer_folder):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, vocab_size=49408
    )
    oracle = CLIPTextModelWithProjection(config).eval()
    state = {key.removeprefix(CLIP): value for key, value in weights.items() if key.startswith(CLIP)}
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert missing == ["text_projection.weight"] and not unexpected

    encoder = sd1.load_text_encoder()
    prompts = ["", "a red circle with thorns"]
    tokens = encoder.towers[0].tokenize(prompts)
    assert tokens[0].tolist() == [49406, *[49407] * 76]
    with torch.no_grad():
        expected = oracle(tokens).last_hidden_state
    assert_close_at_scale(encoder.encode_prompts(prompts)["hidden_states"], expected)
    assert encoder.encode_prompts(prompts).keys() == {"hidden_states"}


@pytest.mark.parametrize("spelling", ["with text_model", "without text_model"])
def test_both_spellings_of_clip_l_load(tmp_path, weights, tokenizer_folder, sd1, spelling):
    if spelling == "without text_model":
        weights = {key.replace(".text_model.", "."): value for key, value in weights.items()}
    checkpoint = load_checkpoint(small.write(tmp_path / "a.safetensors", weights), tokenizer_folder=tokenizer_folder)
    same = [part.load_text_encoder().encode_prompts(["a"])["hidden_states"] for part in (checkpoint, sd1)]
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=0)


def test_a_long_prompt_is_cut_with_a_warning(sd1, caplog):
    encoder = sd1.load_text_encoder()
    with caplog.at_level(logging.WARNING):
        tokens = encoder.towers[0].tokenize(["a" * 75, "a" * 76])
    assert "a prompt of 76 tokens is cut to 75" in caplog.text and len(caplog.records) == 1
    assert tokens.shape == (2, 77) and tokens[:, -1].tolist() == [49407, 49407]


def openclip_output(weights, tokens):
    """OpenCLIP's text model written from its paper's code: torch attention, causal mask, GELU."""
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    mask = torch.full((77, 77), float("-inf")).triu(1)
    hidden = []
    for layer in range(small.CLIP_LAYERS):
        own = {key.split(f"resblocks.{layer}.")[1]: value for key, value in weights.items() if f".{layer}." in key}
        attention = nn.MultiheadAttention(64, 1, batch_first=True)
        attention.load_state_dict({key[5:]: value for key, value in own.items() if key.startswith("attn.")})
        y = nn.functional.layer_norm(x, (64,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = nn.functional.layer_norm(x, (64,), own["ln_2.weight"], own["ln_2.bias"])
        y = nn.functional.gelu(y @ own["mlp.c_fc.weight"].T + own["mlp.c_fc.bias"])
        x = x + y @ own["mlp.c_proj.weight"].T + own["mlp.c_proj.bias"]
        hidden.append(x)
    normed = [nn.functional.layer_norm(x, (64,), weights["ln_final.weight"], weights["ln_final.bias"]) for x in hidden]
    ends = (tokens == 49407).int().argmax(1)
    pooled = normed[-1][torch.arange(len(tokens)), ends] @ weights["text_projection"]
    return hidden, normed, pooled


@torch.no_grad()
def test_sd2_takes_openclips_last_layer_but_one_normed(tmp_path, tokenizer_folder):
    text = small.random_weights(small.openclip_shapes(), seed=3)
    weights = {UNET + key: value for key, value in linear_unet(1024).items()}
    weights |= {f"cond_stage_model.model.{key}": value for key, value in text.items()}
    path = small.write(tmp_path / "sd2.safetensors", weights)
    encoder = load_checkpoint(path, tokenizer_folder=tokenizer_folder).load_text_encoder()
    tokens = encoder.towers[0].tokenize(["a red circle", ""])
    assert tokens[1].tolist() == [49406, 49407, *[0] * 75]
    _, normed, _ = openclip_output(text, tokens)
    conditions = encoder.encode_prompts(["a red circle", ""])
    assert_close_at_scale(conditions["hidden_states"], normed[-2])
    assert "pooled" not in conditions


@torch.no_grad()
def test_sdxl_joins_both_encoders_and_pools_the_second(tmp_path, tokenizer_folder):
    text = small.random_weights(small.openclip_shapes(), seed=4)
    clip_l = small.random_weights(small.clip_shapes(), seed=5)
    weights = {UNET + key: value for key, value in sdxl_unet().items()}
    weights |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in clip_l.items()}
    weights |= {f"conditioner.embedders.1.model.{key}": value for key, value in text.items()}
    path = small.write(tmp_path / "xl.safetensors", weights)
    encoder = load_checkpoint(path, tokenizer_folder=tokenizer_folder).load_text_encoder()
    hidden, _, pooled = openclip_output(text, encoder.towers[1].tokenize(["a red circle", ""]))
    conditions = encoder.encode_prompts(["a red circle", ""])
    assert conditions["hidden_states"].shape == (2, 77, 128)
    assert_close_at_scale(conditions["hidden_states"][..., 64:], hidden[-2])
    assert_close_at_scale(conditions["pooled"], pooled)


# --- the VAE ---


@torch.no_grad()
def test_taesd_latents_are_scaled_as_the_unet_sees_them(sd1, weights):
    vae = sd1.load_vae()
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = vae.encode_images(images)
    assert latents.shape == (2, 4, 2, 3)
    raw = vae.model.encoder.layers(images)  # TAESD itself takes [0, 1]
    assert_close_at_scale(latents, (raw / 0.3 + 0.1) * 0.18215)
    torch.testing.assert_close(vae.model.encoder.layers[14].weight, weights[VAE + "taesd_encoder.14.weight"])
    torch.testing.assert_close(vae.model.decoder.layers[0].weight, weights[VAE + "taesd_decoder.1.weight"])
    torch.testing.assert_close(vae.model.decoder.layers[18].weight, weights[VAE + "taesd_decoder.19.weight"])


@torch.no_grad()
def test_decoding_undoes_the_scaling(sd1):
    vae = sd1.load_vae()
    raw = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = (vae.model.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    assert_close_at_scale(vae.decode_latents((raw / 0.3 + 0.1) * 0.18215), expected)


@torch.no_grad()
def test_a_full_vae_encodes_to_the_mode_or_draws_from_a_generator(tmp_path):
    from diffusers import AutoencoderKL
    from safety_experts.models.vae import kl_key

    torch.manual_seed(0)
    oracle = AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
    ).eval()
    weights = {UNET + key: value for key, value in small.random_weights(small.unet_shapes()).items()}
    for key, value in oracle.state_dict().items():
        is_projection = ".attentions." in key and value.dim() == 2  # 1x1 convolutions in ldm's files
        weights[VAE + kl_key(key, 2)] = value[..., None, None] if is_projection else value
    vae = load_checkpoint(small.write(tmp_path / "a.safetensors", weights)).load_vae(dtype=torch.float16)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    distribution = oracle.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(vae.encode_images(images), distribution.mode() * 0.18215)
    drawn = [vae.encode_images(images, torch.Generator().manual_seed(7)) for _ in range(2)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    assert not torch.allclose(drawn[0], distribution.mode() * 0.18215)


# --- diffusers folders ---


@torch.no_grad()
def test_a_diffusers_folder_gives_what_the_single_file_gives(tmp_path, sd1, tokenizer_folder):
    from diffusers import DDPMScheduler
    from safetensors.torch import save_file

    unet = sd1.load_model()
    attentions = unet.up_blocks[0].attentions
    attentions[0] = copy.deepcopy(attentions[1])  # a folder cannot describe a missing attention
    unet.register_to_config(reverse_transformer_layers_per_block=(1,))
    unet.save_pretrained(tmp_path / "unet")
    sd1.load_vae().model.save_pretrained(tmp_path / "vae")
    text_model = sd1.load_text_encoder().towers[0].model
    (tmp_path / "text_encoder").mkdir()
    save_file(text_model.state_dict(), tmp_path / "text_encoder" / "model.safetensors")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    ).save_pretrained(tmp_path / "scheduler")

    folder = load_checkpoint(tmp_path, tokenizer_folder=tokenizer_folder)
    assert (folder.family, folder.prediction_type, len(folder.sha256)) == ("sd15", "v_prediction", 64)
    torch.testing.assert_close(folder.noise.alphas_cumprod, sd1.noise.alphas_cumprod)
    conditions = [part.load_text_encoder().encode_prompts(["a b"]) for part in (folder, sd1)]
    torch.testing.assert_close(conditions[0], conditions[1])
    inputs = {"sample": torch.ones(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.ones(1, 77, 768)}
    torch.testing.assert_close(folder.load_model()(**inputs).sample, unet(**inputs).sample)
    images = torch.rand(1, 3, 16, 16)
    raw = sd1.load_vae().model.encoder.layers(images)
    torch.testing.assert_close(folder.load_vae().encode_images(images), raw)


# --- bad input: one line that says what, where and what to do ---


def without(weights, prefix):
    return {key: value for key, value in weights.items() if not key.startswith(prefix)}


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"double_blocks.0.img_mod.lin.weight": torch.ones(2)}, "holds no model that can be trained"),
        (lambda w: w | {UNET + "label_emb.0.0.weight": torch.ones(2, 7)}, r"unknown family \(text width 768, vector"),
        (lambda w: w | {UNET + "scaled_fp8": torch.ones(1)}, "holds scaled 8-bit weights"),
        (lambda w: w | {UNET + "input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, "takes 9 input channels"),
    ],
)
def test_a_model_that_cannot_be_trained_is_named_with_the_reason(tmp_path, weights, change, message):
    path = small.write(tmp_path / "other.safetensors", change(weights))
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(path)
    assert "other.safetensors" in one_line(error)


def test_a_truncated_file_is_named(tmp_path, weights):
    path = small.write(tmp_path / "cut.safetensors", weights)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut\.safetensors is truncated .* copy it again") as error:
        load_checkpoint(path)
    one_line(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.ckpt", "is a pickle"),
        ("absent.safetensors", "no such file"),
        ("", "not a complete diffusers folder"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, name, message):
    (tmp_path / "model.ckpt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(tmp_path / name)
    one_line(error)


def test_a_missing_part_is_named_when_it_is_asked_for(tmp_path, weights, tokenizer_folder):
    path = small.write(tmp_path / "unet_only.safetensors", without(without(weights, CLIP), VAE))
    checkpoint = load_checkpoint(path, tokenizer_folder=tokenizer_folder)
    with pytest.raises(InputError, match=r"unet_only\.safetensors holds no text encoder .*Save Checkpoint") as error:
        checkpoint.load_text_encoder()
    one_line(error)
    with pytest.raises(InputError, match=r"unet_only\.safetensors holds no VAE") as error:
        checkpoint.load_vae()
    one_line(error)


@pytest.mark.parametrize(
    ("key", "load"),
    [
        (UNET + "out.0.bias", lambda checkpoint: checkpoint.load_model()),
        (CLIP + "text_model.encoder.layers.1.mlp.fc2.bias", lambda checkpoint: checkpoint.load_text_encoder()),
        (VAE + "taesd_encoder.14.bias", lambda checkpoint: checkpoint.load_vae()),
    ],
)
def test_a_missing_weight_is_named(tmp_path, weights, tokenizer_folder, key, load):
    path = small.write(tmp_path / "a.safetensors", without(weights, key))
    name = key.removeprefix(CLIP)
    with pytest.raises(InputError, match=f"lacks .*{name}") as error:
        load(load_checkpoint(path, tokenizer_folder=tokenizer_folder))
    one_line(error)


def test_a_weight_of_another_shape_is_named(tmp_path, weights):
    path = small.write(tmp_path / "a.safetensors", weights | {UNET + "out.2.weight": torch.ones(4, 32, 1, 1)})
    with pytest.raises(InputError, match=r"conv_out\.weight has shape \[4, 32, 1, 1\]") as error:
        load_checkpoint(path).load_model()
    one_line(error)


def test_a_missing_tokenizer_is_told_how_to_get_one(tmp_path, sd1, monkeypatch):
    with pytest.raises(InputError, match=r"no CLIP tokenizer in .* set COMFYUI_PATH") as error:
        load_checkpoint(sd1.path, tokenizer_folder=tmp_path).load_text_encoder()
    one_line(error)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    small.write_tokenizer(tmp_path / "comfy" / "sd1_tokenizer")
    assert load_checkpoint(sd1.path).load_text_encoder().encode_prompts(["a"])["hidden_states"].shape == (1, 77, 64)


def test_an_unknown_prediction_type_is_refused(sd1):
    with pytest.raises(InputError, match="prediction_type is 'x0'; only epsilon and v_prediction can be trained"):
        load_checkpoint(sd1.path, prediction_type="x0")
