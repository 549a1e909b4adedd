"""The toy model: a one-level SD1.5 UNet, a CLIP-L text model and a TAESD, put together as a single-file checkpoint.

The text model and the UNet's time embedding are never trained: they are drawn again from a seed, not shipped.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import InputError
from ..models.unet_keys import UNetLayout, to_ldm
from ..models.vae import taesd_key

LAYOUT = UNetLayout(
    model_channels=320,
    channel_mult=(1,),
    input_depths=((1,),),
    output_depths=((1, 1),),
    middle_depth=None,
    context_dim=768,
)
FROZEN_PREFIX = "time_embedding."
"""Of the UNet's weights (diffusers' names) that are not trained."""

TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"

_TEXT_SEED = 1
_TIME_SEED = 2
# ComfyUI divides TAESD's latents by vae_scale, and SD1.5's latent format multiplies them by the same number.
_SD15_LATENT_SCALE = 0.18215


def assemble(
    unet: Mapping[str, torch.Tensor],
    autoencoder: Mapping[str, torch.Tensor],
    layout: UNetLayout = LAYOUT,
    text_model: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the checkpoint's tensors in SD1.5's layout, float16.

    Args:
        unet: state dict of diffusers' UNet2DConditionModel of `layout`; frozen weights may be left out.
        autoencoder: state dict of diffusers' AutoencoderTiny.
        text_model: as `seeded_text_model` gives it, which it is by default.
    """
    unet = to_ldm({**unet, **seeded_time_embedding()}, layout)
    text_model = seeded_text_model() if text_model is None else text_model
    tensors = {f"model.diffusion_model.{name}": tensor.half() for name, tensor in unet.items()}
    tensors |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text_model.items()}
    tensors |= vae_tensors(autoencoder)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def vae_tensors(autoencoder: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the checkpoint's VAE from the state dict of diffusers' AutoencoderTiny, float16."""
    tensors = {f"first_stage_model.{taesd_key(name)}": tensor.half() for name, tensor in autoencoder.items()}
    tensors["first_stage_model.vae_scale"] = torch.tensor(_SD15_LATENT_SCALE)
    tensors["first_stage_model.vae_shift"] = torch.tensor(0.0)
    return tensors


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the sha256 of names and contents, whatever the order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()


def seeded_time_embedding() -> dict[str, torch.Tensor]:
    """Return the UNet's untrained time embedding, float16, under diffusers' names."""
    draw = _Draws(_TIME_SEED)
    tensors = {}
    for name, inputs in (("linear_1", 320), ("linear_2", 1280)):
        tensors[f"{FROZEN_PREFIX}{name}.weight"] = draw.uniform((1280, inputs), math.sqrt(2 / inputs))
        tensors[f"{FROZEN_PREFIX}{name}.bias"] = torch.zeros(1280, dtype=torch.float16)
    return tensors


def seeded_text_model() -> dict[str, torch.Tensor]:
    """Return the weights of the untrained CLIP-L text model, float16, under its own names (`text_model.…`).

    The layers add little to the token and position embeddings, so the words of a prompt stay easy to tell apart.
    """
    draw = _Draws(_TEXT_SEED)
    tensors = {
        TOKEN_TABLE: draw.uniform((49408, 768), 0.02),
        "text_model.embeddings.position_embedding.weight": draw.uniform((77, 768), 0.01),
    }
    for layer in range(12):
        prefix = f"text_model.encoder.layers.{layer}."
        sizes = {"self_attn.q_proj": (768, 768, 0.02), "self_attn.k_proj": (768, 768, 0.02)}
        sizes |= {"self_attn.v_proj": (768, 768, 0.02), "self_attn.out_proj": (768, 768, 0.001)}
        sizes |= {"mlp.fc1": (3072, 768, 0.02), "mlp.fc2": (768, 3072, 0.001)}
        for name, (outputs, inputs, deviation) in sizes.items():
            tensors[f"{prefix}{name}.weight"] = draw.uniform((outputs, inputs), deviation)
            tensors[f"{prefix}{name}.bias"] = torch.zeros(outputs, dtype=torch.float16)
        for name in ("layer_norm1", "layer_norm2"):
            tensors |= _identity_norm(prefix + name)
    return tensors | _identity_norm("text_model.final_layer_norm")


def plant_words(text_model: dict[str, torch.Tensor], words: Mapping[str, tuple[str, float]], tokenizer: Any) -> None:
    """Move the embeddings of words near those of others, in place; this is all that the text model knows of synonyms.

    Args:
        text_model: as `seeded_text_model` gives it.
        words: word -> (the word it is planted near, cosine of the two embeddings afterwards); one token each.
        tokenizer: CLIP's.

    Raises:
        InputError: a word has several tokens.
    """

    def token_of(word: str) -> int:
        tokens = tokenizer(word)["input_ids"][1:-1]
        if len(tokens) != 1:
            raise InputError(f"{word!r} has {len(tokens)} tokens; only words of one token can be planted")
        return tokens[0]

    table = text_model[TOKEN_TABLE]
    for word, (near, cosine) in words.items():
        # float64, so that the rounding to float16 comes out the same on every machine.
        kept, other = table[token_of(word)].double(), table[token_of(near)].double()
        direction = other / other.norm()
        rest = kept - (kept @ direction) * direction
        planted = cosine * direction + math.sqrt(1 - cosine**2) * rest / rest.norm()
        table[token_of(word)] = (other.norm() * planted).to(table.dtype)


def _identity_norm(name: str) -> dict[str, torch.Tensor]:
    return {
        f"{name}.weight": torch.ones(768, dtype=torch.float16),
        f"{name}.bias": torch.zeros(768, dtype=torch.float16),
    }


class _Draws:
    """Uniform draws from a bit generator's raw stream, which NumPy keeps the same in every version and place."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def uniform(self, shape: tuple[int, ...], deviation: float) -> torch.Tensor:
        count = math.prod(shape)
        raw = self._bits.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]
        scale = deviation * math.sqrt(12) / 65536
        return torch.from_numpy(((raw.astype(np.float32) - 32767.5) * np.float32(scale)).astype(np.float16)).view(shape)
