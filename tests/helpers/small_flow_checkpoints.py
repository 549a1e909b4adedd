"""Seeded random SD3 and FLUX.1 checkpoints of a few megabytes, with Stability's and Black Forest Labs' names."""

import string
from pathlib import Path

import small_checkpoints as small
import torch
from torch import Tensor

T5_WIDTH = {"sd3": 160, "flux": 64}  # SD3: wider than the two CLIPs of 64 side by side
POOLED_WIDTH = {"sd3": 64 + 32, "flux": 64}
_NO_BIAS = ("query_norm.scale", "key_norm.scale", "ln_q.weight", "ln_k.weight")

Shapes = dict[str, tuple[int, ...]]


def with_biases(modules: Shapes) -> Shapes:
    shapes: Shapes = {}
    for name, shape in modules.items():
        if name == "pos_embed" or name.endswith(_NO_BIAS):
            shapes[name] = shape
        else:
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def sd3_shapes(is_sd35: bool = False) -> Shapes:
    """SD3 of 2 blocks and width 128; SD3.5 medium has normalised queries and keys, and a second attention."""
    width = 128
    modules: Shapes = {
        "pos_embed": (1, 64, width),
        "x_embedder.proj": (width, 16, 2, 2),
        "context_embedder": (width, T5_WIDTH["sd3"]),
        "t_embedder.mlp.0": (width, 256),
        "t_embedder.mlp.2": (width, width),
        "y_embedder.mlp.0": (width, POOLED_WIDTH["sd3"]),
        "y_embedder.mlp.2": (width, width),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    for number in (0, 1):
        for stream in ("context_block", "x_block"):
            block = f"joint_blocks.{number}.{stream}"
            is_last_text, has_second = (number, stream) == (1, "context_block"), (number, stream) == (0, "x_block")
            modules[f"{block}.attn.qkv"] = (3 * width, width)
            modulations = 2 if is_last_text else 9 if is_sd35 and has_second else 6
            modules[f"{block}.adaLN_modulation.1"] = (modulations * width, width)
            if is_sd35:
                modules |= {f"{block}.attn.ln_q.weight": (64,), f"{block}.attn.ln_k.weight": (64,)}
            if is_sd35 and has_second:
                modules |= {f"{block}.attn2.qkv": (3 * width, width), f"{block}.attn2.proj": (width, width)}
                modules |= {f"{block}.attn2.ln_q.weight": (64,), f"{block}.attn2.ln_k.weight": (64,)}
            if not is_last_text:
                modules |= {f"{block}.attn.proj": (width, width)}
                modules |= {f"{block}.mlp.fc1": (4 * width, width), f"{block}.mlp.fc2": (width, 4 * width)}
    return with_biases(modules)


def flux_shapes(width: int = 128, has_guidance: bool = True) -> Shapes:
    """FLUX.1 of one double and one single block; dev has a guidance input, schnell none."""
    modules: Shapes = {
        "img_in": (width, 64),
        "txt_in": (width, T5_WIDTH["flux"]),
        "final_layer.linear": (64, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "single_blocks.0.modulation.lin": (3 * width, width),
        "single_blocks.0.linear1": (7 * width, width),
        "single_blocks.0.linear2": (width, 5 * width),
    }
    inputs = {"time_in": 256, "vector_in": POOLED_WIDTH["flux"]} | ({"guidance_in": 256} if has_guidance else {})
    for name, size in inputs.items():
        modules |= {f"{name}.in_layer": (width, size), f"{name}.out_layer": (width, width)}
    norms = ["single_blocks.0.norm"]
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        modules |= {f"{block}_mod.lin": (6 * width, width), f"{block}_attn.qkv": (3 * width, width)}
        modules |= {f"{block}_attn.proj": (width, width)}
        modules |= {f"{block}_mlp.0": (4 * width, width), f"{block}_mlp.2": (width, 4 * width)}
        norms.append(f"{block}_attn.norm")
    for norm in norms:
        modules |= {f"{norm}.query_norm.scale": (128,), f"{norm}.key_norm.scale": (128,)}
    return with_biases(modules)


def t5_shapes(width: int) -> Shapes:
    """A T5 v1.1 encoder of 2 layers and one head of 64, with the 60 words of `write_t5_tokenizer`."""
    shapes: Shapes = {"shared.weight": (60, width), "encoder.final_layer_norm.weight": (width,)}
    for layer in (0, 1):
        attention, feed_forward = (f"encoder.block.{layer}.layer.{part}" for part in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{letter}.weight": (64, width) for letter in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, 64)
        shapes |= {f"{part}.layer_norm.weight": (width,) for part in (attention, feed_forward)}
        shapes |= {f"{feed_forward}.DenseReluDense.wi_{half}.weight": (96, width) for half in (0, 1)}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, 96)
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 1)
    return shapes


def checkpoint_weights(family: str) -> dict[str, Tensor]:
    """A reduced checkpoint with every part, in float32."""
    transformer = sd3_shapes() if family == "sd3" else flux_shapes()
    shapes = {f"model.diffusion_model.{key}": shape for key, shape in transformer.items()}
    shapes |= {f"text_encoders.clip_l.transformer.{key}": shape for key, shape in small.clip_shapes().items()}
    if family == "sd3":
        shapes |= {f"text_encoders.clip_g.{key}": shape for key, shape in small.openclip_shapes().items()}
    t5 = t5_shapes(T5_WIDTH[family])
    shapes |= {f"text_encoders.t5xxl.transformer.{key}": shape for key, shape in t5.items()}
    vae = "first_stage_model." if family == "sd3" else "vae."
    shapes |= {f"{vae}{key}": shape for key, shape in small.taesd_shapes(latent_channels=16).items()}
    weights = small.random_weights(shapes)
    return weights | {f"{vae}vae_scale": torch.tensor(0.3), f"{vae}vae_shift": torch.tensor(0.1)}


def write_tokenizers(folder: Path) -> Path:
    """CLIP's and T5's tokenizers laid out as in ComfyUI; returns CLIP's folder."""
    write_t5_tokenizer(folder / "text_encoders" / "t5_tokenizer")
    return small.write_tokenizer(folder / "sd1_tokenizer")


def write_t5_tokenizer(folder: Path) -> Path:
    """T5's own padding and end, and a vocabulary of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = ["<pad>", "</s>", "<unk>", "▁"]
    pieces += [start + letter for start in ("", "▁") for letter in string.ascii_lowercase]
    tokenizer = Tokenizer(models.Unigram([(piece, -index / 100) for index, piece in enumerate(pieces)], unk_id=2))
    tokenizer.add_special_tokens(pieces[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
