"""Run inside a real ComfyUI: write small random checkpoints with ComfyUI's own names, and what ComfyUI makes of them.

    python comfyui_outputs.py COMFYUI_FOLDER OUT_FOLDER < models.json

models.json: name -> description (see test_checkpoint_parity.py). Each gets a folder OUT_FOLDER/<name> with
checkpoint.safetensors and outputs.safetensors, and where it names the keys of one an embedding, soft.safetensors.
"""

import json
import sys
from pathlib import Path

sys.path[0] = sys.argv[1]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.clip_model  # noqa: E402
import comfy.diffusers_convert  # noqa: E402
import comfy.ldm.flux.model  # noqa: E402
import comfy.model_sampling  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.taesd.taesd import TAESD  # noqa: E402
from comfy.text_encoders.t5 import T5  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

PROMPTS = ["", "a red circle with thorns"]
KL_CONFIG = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip
CLIP_CONFIG = {"max_position_embeddings": 77, "eos_token_id": 49407}
T5_CONFIG = {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "t5"}


def main() -> None:
    for name, description in json.load(sys.stdin).items():
        folder = Path(sys.argv[2]) / name
        folder.mkdir(parents=True)
        write_outputs(folder, description)


def write_outputs(folder: Path, description: dict) -> None:
    generator = torch.Generator().manual_seed(0)
    save_file(random_weights(description, generator), folder / "checkpoint.safetensors")
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(
        str(folder / "checkpoint.safetensors"),
        embedding_directory=str(folder),
        te_model_options={f"{tower['name']}_model_config": tower["config"] for tower in description["text_models"]},
    )
    with torch.inference_mode():
        if "transformer" in description:
            outputs = transformer_outputs(model, description, generator)
        else:
            outputs = unet_outputs(model, description["unet"], generator)
        outputs |= text_outputs(clip)
        if keys := description.get("soft_prompt"):
            towers = zip(keys, description["text_models"], strict=True)
            vectors = {
                key: torch.randn(2, tower["config"]["hidden_size"], generator=generator) for key, tower in towers
            }
            save_file(vectors, folder / "soft.safetensors")
            hidden, pooled = clip.encode_from_tokens(clip.tokenize(f"{PROMPTS[1]} embedding:soft"), return_pooled=True)
            outputs |= {"soft.hidden_states": hidden, "soft.pooled": pooled}
        outputs |= vae_outputs(model, vae, generator)
    save_file({key: value.float().contiguous() for key, value in outputs.items()}, folder / "outputs.safetensors")


def random_weights(description: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {}

    def add(prefix: str, module: torch.nn.Module) -> None:
        shapes.update({prefix + key: value.shape for key, value in module.state_dict().items()})

    with torch.device("meta"):
        add("model.diffusion_model.", denoising_model(description))
        tiny_vae = TAESD(latent_channels=16 if "transformer" in description else 4)
        vae = tiny_vae if description["taesd"] else AutoencoderKL(ddconfig=KL_CONFIG, embed_dim=4)
        add(description.get("vae_prefix", "first_stage_model."), vae)
        for tower in description["text_models"]:
            is_t5 = tower["name"] == "t5xxl"
            config = tower["config"] | (T5_CONFIG if is_t5 else CLIP_CONFIG)
            model_class = T5 if is_t5 else comfy.clip_model.CLIPTextModel
            add(tower["prefix"], model_class(config, None, None, comfy.ops.disable_weight_init))
    weights = {}
    for key, shape in shapes.items():
        numbers = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            numbers /= shape[1:].numel() ** 0.5
        else:
            numbers = numbers * 0.1 + (1.0 if key.endswith("weight") else 0.0)
        weights[key] = numbers.half()  # ComfyUI keeps text encoders in float16: let that lose nothing
    weights |= {key: torch.tensor(value) for key, value in description["numbers"].items()}
    for tower in description["text_models"]:
        if tower["openclip"]:
            weights = spelled_as_openclip(weights, tower["prefix"].removesuffix("transformer."))
    return weights


def denoising_model(description: dict) -> torch.nn.Module:
    operations = comfy.ops.disable_weight_init
    if description.get("transformer") == "sd3":
        return OpenAISignatureMMDITWrapper(operations=operations, **description["config"])
    if description.get("transformer") == "flux":
        return comfy.ldm.flux.model.Flux(operations=operations, **description["config"])
    return UNetModel(
        image_size=32, out_channels=4, use_spatial_transformer=True, legacy=False,
        operations=operations, **description["unet"],
    )  # fmt: skip


def spelled_as_openclip(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    rest = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    tower = {f"clip.{key.removeprefix(prefix)}": value for key, value in weights.items() if key.startswith(prefix)}
    converted = comfy.diffusers_convert.convert_text_enc_state_dict_v20(tower, "clip")
    return rest | {prefix + key.removeprefix("clip."): value.contiguous() for key, value in converted.items()}


def transformer_outputs(model, description: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """The prediction under ComfyUI's own conditions, guidance included; the odd height makes it pad."""
    sampling = model.model.model_sampling
    assert isinstance(sampling, comfy.model_sampling.CONST)  # x0 = x - sigma · prediction
    timesteps = torch.tensor([3, 777])
    inputs = {
        "noisy": torch.randn(2, 16, 7, 8, generator=generator),
        "hidden_states": torch.randn(2, 77, description["context_dim"], generator=generator),
        "pooled": torch.randn(2, description["pooled_dim"], generator=generator),
        "timesteps": timesteps,
    }
    conditions = model.model.extra_conds(
        cross_attn=inputs["hidden_states"], pooled_output=inputs["pooled"], noise=inputs["noisy"], device="cpu"
    )
    values = {name: condition.cond for name, condition in conditions.items()}
    context = values.pop("c_crossattn")
    sigmas = torch.tensor([sampling.percent_to_sigma(1 - (index + 1) / 1000) for index in range(1000)])
    transformer = model.model.diffusion_model.float()
    predicted = transformer(inputs["noisy"], sampling.timestep(sigmas[timesteps]), context=context, **values)
    return {f"unet.{key}": value for key, value in inputs.items()} | {"unet.predicted": predicted, "sigmas": sigmas}


def unet_outputs(model, config: dict, generator: torch.Generator) -> dict[str, torch.Tensor]:
    inputs = {
        "noisy": torch.randn(2, 4, 8, 8, generator=generator),
        "hidden_states": torch.randn(2, 77, config["context_dim"], generator=generator),
        "timesteps": torch.tensor([3, 777]),
    }
    vector = None
    if "adm_in_channels" in config:
        inputs["pooled"] = torch.randn(2, 1280, generator=generator)
        vector = model.model.encode_adm(pooled_output=inputs["pooled"], width=64, height=64)
    unet = model.model.diffusion_model.float()
    predicted = unet(inputs["noisy"], inputs["timesteps"], context=inputs["hidden_states"], y=vector)
    sampling = model.model.model_sampling
    return {f"unet.{key}": value for key, value in inputs.items()} | {
        "unet.predicted": predicted,
        "alphas_cumprod": 1 / (sampling.sigmas**2 + 1),
        "predicts_velocity": torch.tensor(isinstance(sampling, comfy.model_sampling.V_PREDICTION)),
    }


def text_outputs(clip) -> dict[str, torch.Tensor]:
    hidden, pooled = zip(
        *(clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True) for prompt in PROMPTS), strict=True
    )
    return {"text.hidden_states": torch.cat(hidden), "text.pooled": torch.cat(pooled)}


def vae_outputs(model, vae, generator: torch.Generator) -> dict[str, torch.Tensor]:
    images = torch.rand(1, 32, 32, 3, generator=generator)  # ComfyUI's images are [b, h, w, c]
    vae.first_stage_model.float()
    vae.vae_dtype = torch.float32
    latents = vae.encode(images)
    return {
        "vae.images": images.movedim(-1, 1),
        "vae.latents": model.model.process_latent_in(latents),
        "vae.decoded": vae.decode(latents).movedim(-1, 1),
    }


main()
