"""SD1.5 and SDXL with random weights, and a training step on them as the published SafetyDPO code takes it.

Written from the method's description (methods §1.1-1.2) and Visualignment/SafetyDPO:train.py: a second frozen UNet as
reference, VAE and text encoder in every step, half precision weights and autocast, AdamW; SDXL with Adafactor, gradient
checkpointing, and VAE, text encoders and reference offloaded to the CPU.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """A model family to build with random weights."""

    size_px: int
    context_dim: int
    unet: dict
    is_tiny_vae: bool = False
    num_text_towers: int = 1

    @property
    def is_sdxl(self) -> bool:
        return self.num_text_towers == 2


_FULL = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,
}
SHAPES = {
    "toy": Shape(
        64,
        768,
        {
            "block_out_channels": (320,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "mid_block_type": None,
            "layers_per_block": 1,
        },
        is_tiny_vae=True,
    ),
    "sd15": Shape(512, 768, _FULL),
    "sdxl": Shape(
        1024,
        2048,
        {
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        num_text_towers=2,
    ),
}


def build_unet(shape: Shape, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    sizes = {"sample_size": shape.size_px // 8, "cross_attention_dim": shape.context_dim, "attention_head_dim": 8}
    with device:
        unet = UNet2DConditionModel(**sizes | shape.unet).to(dtype)
    return unet.requires_grad_(False)


def build_encoders(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.nn.Module, list]:
    """Return (VAE, text models): TAESD or AutoencoderKL; CLIP-L and, for SDXL, OpenCLIP-G."""
    from diffusers import AutoencoderKL, AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel

    blocks = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    wide = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
    }
    narrow = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with device:
        vae = AutoencoderTiny() if shape.is_tiny_vae else AutoencoderKL(**blocks)
        texts = [CLIPTextModel(CLIPTextConfig(**size)) for size in (narrow, wide)[: shape.num_text_towers]]
    return vae.to(dtype).requires_grad_(False), [text.to(dtype).requires_grad_(False) for text in texts]


def added_conditions(shape: Shape, rows: int, device: torch.device) -> dict[str, Tensor] | None:
    if not shape.is_sdxl:
        return None
    sizes = torch.tensor([shape.size_px, shape.size_px, 0, 0, shape.size_px, shape.size_px], device=device)
    return {"text_embeds": torch.zeros(rows, 1280, device=device), "time_ids": sizes.float().expand(rows, -1)}


def replica_step(
    shape: Shape, device: torch.device, batch_size: int, *, has_second_unet: bool, is_cached: bool
) -> Callable[[], None]:
    """Return a function that takes one step as the published code describes it."""
    half = torch.float16 if device.type == "cuda" else torch.bfloat16  # a CPU's autocast is fast in bfloat16 only
    unet = build_unet(shape, device, half)
    reference = copy.deepcopy(unet) if has_second_unet else unet
    parameters = add_peft_lora(unet)
    if shape.is_sdxl:
        unet.train()
        unet.enable_gradient_checkpointing()
    optimizer = adafactor(parameters) if shape.is_sdxl else torch.optim.AdamW(parameters, lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    vae, texts = (None, []) if is_cached else build_encoders(shape, device, half)
    if shape.is_sdxl:
        offload([*([vae] if vae else []), *texts, *([reference] if has_second_unet else [])], device)
    latent_size = shape.size_px // 8
    alphas = torch.linspace(0.999, 0.005, 1000, device=device)

    def encode() -> tuple[Tensor, Tensor]:
        if vae is None:
            return (
                torch.randn(2 * batch_size, 4, latent_size, latent_size, device=device),
                torch.randn(batch_size, 77, shape.context_dim, device=device),
            )
        images = torch.rand(2 * batch_size, 3, shape.size_px, shape.size_px, device=device).to(half) * 2 - 1
        encoded = vae.encode(images)
        latents = encoded.latents if shape.is_tiny_vae else encoded.latent_dist.sample() * 0.18215
        tokens = torch.randint(0, 49407, (batch_size, 77), device=device)
        hidden = [text(tokens, output_hidden_states=True).hidden_states[-2] for text in texts]
        return latents.float(), torch.cat(hidden, dim=-1)

    def step() -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype=half):
            latents, hidden = encode()
        noise = torch.randn(batch_size, *latents.shape[1:], device=device).repeat(2, 1, 1, 1)
        timesteps = torch.randint(0, 1000, (batch_size,), device=device).repeat(2)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        inputs = {
            "encoder_hidden_states": hidden.repeat(2, 1, 1),
            "added_cond_kwargs": added_conditions(shape, 2 * batch_size, device),
        }
        with torch.autocast(device.type, dtype=half):
            with torch.no_grad():
                if has_second_unet:
                    expected = reference(noisy, timesteps, **inputs).sample
                else:
                    unet.disable_adapters()
                    expected = unet(noisy, timesteps, **inputs).sample
                    unet.enable_adapters()
            predicted = unet(noisy, timesteps, **inputs).sample
        errors = [(p.float() - noise).square().flatten(1).mean(1).split(batch_size) for p in (predicted, expected)]
        logit = -2500 * ((errors[0][0] - errors[0][1]) - (errors[1][0] - errors[1][1]))
        scaler.scale(-functional.logsigmoid(logit).mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def add_peft_lora(unet: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Give the UNet the published LoRA and return its weights, in float32."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(unet, torch.float32)
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def adafactor(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=1e-5, clip_threshold=1.0, scale_parameter=False, relative_step=False)


def offload(models: list[torch.nn.Module], device: torch.device) -> None:
    """Keep the weights on the CPU and copy each layer's to `device` whenever it runs."""
    from accelerate import cpu_offload

    for model in models:
        cpu_offload(model, execution_device=device)
