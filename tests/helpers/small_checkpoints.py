"""Seeded random checkpoints of a few megabytes, with names spelled out rather than derived from the code under test."""

import json
import string
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CHANNELS = 32
CLIP_WIDTH, CLIP_LAYERS = 64, 2

_RESIDUAL = {
    "in_layers.0": (None,),
    "in_layers.2": (CHANNELS, None, 3, 3),
    "emb_layers.1": (CHANNELS, 4 * CHANNELS),
    "out_layers.0": (CHANNELS,),
    "out_layers.3": (CHANNELS, CHANNELS, 3, 3),
}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights near 1 and biases near 0 for vectors, fan-in scaled normals for the rest."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in shapes.items():
        numbers = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[key] = numbers / torch.Size(shape[1:]).numel() ** 0.5
        else:
            weights[key] = numbers * 0.1 + (1.0 if key.endswith("weight") else 0.0)
    return weights


def unet_shapes(context_dim: int = 768, in_channels: int = 4) -> dict[str, tuple[int, ...]]:
    """ldm names of the toy's layout: one level, no middle, attention behind all blocks but the first of the way up."""
    modules: dict[str, tuple[int, ...]] = {
        "time_embed.0": (4 * CHANNELS, CHANNELS),
        "time_embed.2": (4 * CHANNELS, 4 * CHANNELS),
        "input_blocks.0.0": (CHANNELS, in_channels, 3, 3),
        "out.0": (CHANNELS,),
        "out.2": (4, CHANNELS, 3, 3),
    }
    for block, width in (("input_blocks.1", CHANNELS), ("output_blocks.0", 64), ("output_blocks.1", 64)):
        for name, shape in _RESIDUAL.items():
            modules[f"{block}.0.{name}"] = tuple(width if size is None else size for size in shape)
        if width != CHANNELS:
            modules[f"{block}.0.skip_connection"] = (CHANNELS, width, 1, 1)
    for block in ("input_blocks.1.1", "output_blocks.1.1"):
        modules |= {f"{block}.norm": (CHANNELS,), f"{block}.proj_in": (CHANNELS, CHANNELS, 1, 1)}
        modules |= {f"{block}.proj_out": (CHANNELS, CHANNELS, 1, 1)}
        inner = f"{block}.transformer_blocks.0"
        modules |= {f"{inner}.norm{number}": (CHANNELS,) for number in (1, 2, 3)}
        modules |= {f"{inner}.ff.net.0.proj": (8 * CHANNELS, CHANNELS), f"{inner}.ff.net.2": (CHANNELS, 4 * CHANNELS)}
        for attention, width in (("attn1", CHANNELS), ("attn2", context_dim)):
            modules[f"{inner}.{attention}.to_q"] = (CHANNELS, CHANNELS)
            modules[f"{inner}.{attention}.to_k"] = modules[f"{inner}.{attention}.to_v"] = (CHANNELS, width)
            modules[f"{inner}.{attention}.to_out.0"] = (CHANNELS, CHANNELS)
    shapes = {}
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape
        if not name.endswith(("to_q", "to_k", "to_v")):
            shapes[f"{name}.bias"] = shape[:1]
    return shapes


def clip_shapes(width: int = CLIP_WIDTH) -> dict[str, tuple[int, ...]]:
    """transformers' names of a CLIP text model of 2 layers."""
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    modules: dict[str, tuple[int, ...]] = {"text_model.final_layer_norm": (width,)}
    for layer in range(CLIP_LAYERS):
        base = f"text_model.encoder.layers.{layer}"
        modules |= {f"{base}.layer_norm1": (width,), f"{base}.layer_norm2": (width,)}
        modules |= {f"{base}.self_attn.{letter}_proj": (width, width) for letter in "qkv"}
        modules |= {f"{base}.self_attn.out_proj": (width, width)}
        modules |= {f"{base}.mlp.fc1": (2 * width, width), f"{base}.mlp.fc2": (width, 2 * width)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def openclip_shapes() -> dict[str, tuple[int, ...]]:
    """OpenCLIP's names of a text model of 2 layers, width 64 and a projection to 32."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, CLIP_WIDTH),
        "token_embedding.weight": (49408, CLIP_WIDTH),
        "ln_final.weight": (CLIP_WIDTH,),
        "ln_final.bias": (CLIP_WIDTH,),
        "text_projection": (CLIP_WIDTH, 32),
    }
    for layer in range(CLIP_LAYERS):
        base = f"transformer.resblocks.{layer}"
        shapes |= {f"{base}.attn.in_proj_weight": (192, CLIP_WIDTH), f"{base}.attn.in_proj_bias": (192,)}
        modules = {
            "ln_1": (64,),
            "ln_2": (64,),
            "attn.out_proj": (64, 64),
            "mlp.c_fc": (128, 64),
            "mlp.c_proj": (64, 128),
        }
        for name, shape in modules.items():
            shapes |= {f"{base}.{name}.weight": shape, f"{base}.{name}.bias": shape[:1]}
    return shapes


def taesd_shapes(latent_channels: int = 4) -> dict[str, tuple[int, ...]]:
    """ComfyUI's names of a TAESD."""
    encoder = {"0": (64, 3, 3, 3), "14": (latent_channels, 64, 3, 3)}
    encoder |= {str(index): (64, 64, 3, 3) for index in (2, 6, 10)}
    decoder = {"1": (64, latent_channels, 3, 3), "19": (3, 64, 3, 3)}
    decoder |= {str(index): (64, 64, 3, 3) for index in (7, 12, 17)}
    blocks = {"taesd_encoder": (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), "taesd_decoder": (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)}
    shapes: dict[str, tuple[int, ...]] = {}
    for coder, plain in (("taesd_encoder", encoder), ("taesd_decoder", decoder)):
        for index, shape in plain.items():
            shapes[f"{coder}.{index}.weight"] = shape
            if shape != (64, 64, 3, 3):
                shapes[f"{coder}.{index}.bias"] = shape[:1]
        for index in blocks[coder]:
            for conv in (0, 2, 4):
                shapes[f"{coder}.{index}.conv.{conv}.weight"] = (64, 64, 3, 3)
                shapes[f"{coder}.{index}.conv.{conv}.bias"] = (64,)
    return shapes


def sd1_weights(seed: int = 0) -> dict[str, Tensor]:
    """A reduced SD1 checkpoint with every part, in float32."""
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in unet_shapes().items()}
    shapes |= {f"cond_stage_model.transformer.{key}": shape for key, shape in clip_shapes().items()}
    shapes |= {f"first_stage_model.{key}": shape for key, shape in taesd_shapes().items()}
    weights = random_weights(shapes, seed)
    weights["first_stage_model.vae_scale"] = torch.tensor(0.3)
    weights["first_stage_model.vae_shift"] = torch.tensor(0.1)
    return weights


def write(path: Path, weights: dict[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return path


def write_tokenizer(folder: Path) -> Path:
    """CLIP's tokenizer with its own start, end and first token, and a vocabulary of single letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["!"] + [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder
