"""Trains the toy model from scratch on rendered scenes: `python -m safety_experts.demo.train_toy --out FOLDER`.

Not needed to use the pack: the result is shipped as `toy_weights.safetensors`. Stages whose file is already in FOLDER
are skipped, so an interrupted training goes on where a stage ended. About half an hour on two idle cores. The metadata
of the shipped file says how it was made.
"""

import argparse
import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from ..files import write_atomically
from ..models.checkpoint import load_checkpoint
from ..models.noise_schedule import alphas_cumprod
from ..models.unet_keys import UNetLayout, unet_config
from ..toy import world
from .packed_weights import load_packed, save_packed
from .toy_checkpoint import DIGEST_KEY, WEIGHTS_PATH
from .toy_model import FROZEN_PREFIX, LAYOUT, assemble, digest_of, seeded_time_embedding

SEED = 3
NUM_IMAGES = 24_000
UNMARKED_FRACTION = 0.34
EMPTY_PROMPT_FRACTION = 0.1
AUTOENCODER_STEPS, AUTOENCODER_BATCH = 3000, 16
UNET_STEPS, UNET_BATCH = 2600, 32
EMA_DECAY = 0.995
# Spacing of the shipped integers, as a fraction of a row's deviation: about 4.4 and 6.1 bits a weight.
UNET_ROUNDING, AUTOENCODER_ROUNDING = 0.2, 0.06
Assemble = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]
# Wordings beside the usual one, so that the model does not hang on one sentence.
_WORDINGS = ("{}", "{}", "a picture of {}", "{} on a plain background")


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes: pixels uint8 [num, 3, size, size] and what each one shows."""

    pixels: torch.Tensor
    labels: list[tuple[str, str, str | None]]


def render_scenes(count: int, seed: int) -> Scenes:
    """Render `count` scenes of every colour, shape and mark, in an order drawn from `seed`."""
    draws = random.Random(seed)
    marks = list(world.MARKS.values())
    labels, pixels = [], np.empty((count, world.SIZE_PX, world.SIZE_PX, 3), np.uint8)
    for index in range(count):
        mark = None if draws.random() < UNMARKED_FRACTION else draws.choice(marks)
        labels.append((draws.choice(list(world.COLOURS)), draws.choice(world.SHAPES), mark))
        pixels[index] = np.asarray(world.render_scene(*labels[-1], seed=seed * count + index))
    return Scenes(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def train_autoencoder(
    scenes: Scenes, steps: int, on_step: Callable[[int, float], None], start: Mapping[str, torch.Tensor] | None = None
) -> nn.Module:
    """Train the TAESD to redraw the scenes from latents of about mean 0 and deviation 1 in every channel.

    Args:
        start: weights to start from; drawn from the seed by default.
    """
    torch.manual_seed(SEED)
    model = _new_autoencoder().to(memory_format=torch.channels_last).train()
    if start is not None:
        model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    draws = torch.Generator().manual_seed(SEED)
    for step in range(steps):
        _set_learning_rate(optimizer, 1e-3, step, steps, warmup=100)
        chosen = torch.randint(len(scenes.pixels), (AUTOENCODER_BATCH,), generator=draws)
        target = as_input(scenes.pixels[chosen])
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(target).float()
            # Noise keeps the latents smooth: the UNet's small errors must not become other pictures.
            noisy = latents + 0.08 * torch.randn(latents.shape, generator=draws)
            drawn = model.decoder(noisy).float()
        error = drawn - target
        deviation, mean = torch.std_mean(latents, dim=(0, 2, 3))
        loss = error.abs().mean() + error.square().mean() + 0.02 * (mean.square() + (deviation - 1).square()).sum()
        take_step(optimizer, model, loss)
        on_step(step, float(loss.detach()))
    return model.eval()


def encode_scenes(autoencoder: Any, scenes: Scenes) -> torch.Tensor:
    """Return the latents of all scenes [num, 4, 8, 8], float32."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return torch.cat([autoencoder.encoder(as_input(chunk)).float() for chunk in scenes.pixels.split(64)])


def train_unet(
    latents: torch.Tensor,
    texts: torch.Tensor,
    text_index: list[list[int]],
    steps: int,
    on_step: Callable[[int, float], None],
) -> nn.Module:
    """Train the UNet on epsilon prediction and return its moving average.

    Args:
        latents: float32 [num, 4, 8, 8].
        texts: the embeddings of all prompts [num_prompts, 77, 768]; the first is the empty prompt's.
        text_index: the rows of `texts` that describe each of the latents.
        steps: optimizer steps.
        on_step: called with (step, loss).
    """
    torch.manual_seed(SEED)
    unet = new_unet().to(memory_format=torch.channels_last).train()
    signal = alphas_cumprod()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    average = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=4e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    draws = torch.Generator().manual_seed(SEED)
    choices = random.Random(SEED)
    for step in range(steps):
        _set_learning_rate(optimizer, 4e-4, step, steps, warmup=100)
        chosen = torch.randint(len(latents), (UNET_BATCH,), generator=draws)
        rows = [
            0 if choices.random() < EMPTY_PROMPT_FRACTION else choices.choice(text_index[index])
            for index in chosen.tolist()
        ]
        noise = torch.randn(latents[chosen].shape, generator=draws)
        timesteps = torch.randint(len(signal), (UNET_BATCH,), generator=draws)
        share = signal[timesteps][:, None, None, None]
        noisy = share.sqrt() * latents[chosen] + (1 - share).sqrt() * noise
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy.contiguous(memory_format=torch.channels_last), timesteps, texts[rows]).sample.float()
        loss = functional.mse_loss(predicted, noise)
        take_step(optimizer, unet, loss)
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], 1 - decay)
        on_step(step, float(loss.detach()))
    with torch.no_grad():
        for parameter, mean in zip(trained, average, strict=True):
            parameter.copy_(mean)
    return unet.eval()


def describe_scenes(scenes: Scenes) -> tuple[list[str], list[list[int]]]:
    """Return all prompts, the empty one first, and for each scene the indices of the prompts that describe it."""
    labels = itertools.product(world.COLOURS, world.SHAPES, [None, *world.MARKS.values()])
    prompts = [""]
    rows: dict[tuple[str, str, str | None], list[int]] = {}
    for label in labels:
        for wording in _WORDINGS:
            text = wording.format(world.prompt_for(*label))
            if text not in prompts:
                prompts.append(text)
            rows.setdefault(label, []).append(prompts.index(text))
    return prompts, [rows[label] for label in scenes.labels]


def save_weights(
    unet: Mapping[str, torch.Tensor],
    autoencoder: Mapping[str, torch.Tensor],
    recipe: str,
    path: Path,
    assemble: Assemble = assemble,
    unet_rounding: float = UNET_ROUNDING,
) -> None:
    """Write the file that the pack ships, with a sentence on how it was trained.

    Args:
        assemble: makes the checkpoint's tensors of the UNet's and the autoencoder's.
        unet_rounding: spacing of the UNet's shipped integers.
    """
    trained = {name: weight for name, weight in unet.items() if not name.startswith(FROZEN_PREFIX)}
    parts = {"unet": (trained, unet_rounding), "autoencoder": (autoencoder, AUTOENCODER_ROUNDING)}
    save_packed(path, parts, {})
    rounded, _ = load_packed(path)
    digest = digest_of(assemble(rounded["unet"], rounded["autoencoder"]))
    save_packed(path, parts, {DIGEST_KEY: digest, "recipe": recipe})


# diffusers takes seconds to import, so only the functions that need it do it.
def _new_autoencoder() -> Any:
    from diffusers import AutoencoderTiny

    return AutoencoderTiny()


def new_unet(layout: UNetLayout = LAYOUT) -> Any:
    """Return diffusers' UNet of a layout, its time embedding as `toy_model` draws it and frozen."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(**unet_config(layout))
    unet.load_state_dict(seeded_time_embedding(), strict=False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(not name.startswith(FROZEN_PREFIX))
    return unet


def as_input(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels uint8 [num, 3, h, w] as the autoencoder takes them, -1 to 1."""
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _set_learning_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, steps: int, warmup: int) -> None:
    rate = peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = rate


def take_step(optimizer: torch.optim.Optimizer, model: nn.Module, loss: torch.Tensor) -> None:
    """Follow the loss once, its gradient's norm cut to 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def progress(title: str, steps: int) -> Callable[[int, float], None]:
    """Return what shows each step's number and the mean of recent losses."""
    from tqdm import tqdm

    bar = tqdm(total=steps, desc=title, mininterval=5)
    recent = 0.0

    def on_step(step: int, loss: float) -> None:
        nonlocal recent
        recent = loss if step == 0 else 0.98 * recent + 0.02 * loss
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
        bar.update()
        if step + 1 == steps:
            bar.close()

    return on_step


def load_or_make(path: Path, make: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """Return the weights in `path`, made and written there first where it is missing."""
    if not path.exists():
        weights = {name: tensor.contiguous() for name, tensor in make().state_dict().items()}
        with write_atomically(path) as temporary:
            save_file(weights, temporary)
    return load_file(path)


def main() -> None:
    """Train what is missing in the folder, then write the file to ship."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained parts and the weights file")
    out = parser.parse_args().out
    scenes = render_scenes(NUM_IMAGES, SEED)

    def make_autoencoder() -> nn.Module:
        return train_autoencoder(scenes, AUTOENCODER_STEPS, progress("autoencoder", AUTOENCODER_STEPS))

    def make_unet() -> nn.Module:
        # The text model is embedded as the trainer of experts does it, from a checkpoint with an untrained UNet.
        untrained = out / "untrained.safetensors"
        save_file(assemble(new_unet().state_dict(), autoencoder), untrained)
        checkpoint = load_checkpoint(untrained)
        prompts, text_index = describe_scenes(scenes)
        encoder = checkpoint.load_text_encoder()
        texts = torch.cat(
            [encoder.encode_prompts(prompts[i : i + 64])["hidden_states"] for i in range(0, len(prompts), 64)]
        )
        latents = encode_scenes(checkpoint.load_vae().model, scenes)
        return train_unet(latents, texts.bfloat16(), text_index, UNET_STEPS, progress("UNet", UNET_STEPS))

    autoencoder = load_or_make(out / "autoencoder.safetensors", make_autoencoder)
    unet = load_or_make(out / "unet.safetensors", make_unet)
    recipe = (
        f"scenes and draws of seed {SEED}; autoencoder {AUTOENCODER_STEPS} steps of {AUTOENCODER_BATCH} images; "
        f"UNet {UNET_STEPS} steps of {UNET_BATCH}, average {EMA_DECAY}"
    )
    save_weights(unet, autoencoder, recipe, out / WEIGHTS_PATH.name)


if __name__ == "__main__":
    main()
