"""Trains the bench world's model: `python -m safety_experts.demo.train_bench [--minutes N]`.

Takes hours on one core, so it is made to be run in pieces: started again, it goes on at the step it had reached (after
SIGTERM, Ctrl-C or --minutes: at that very step; after a kill: at the last state, at most `SAVE_EVERY` steps ago), and
every step draws from a seed of its own, so the pieces give what one run gives. It starts from the toy model's weights,
which know the colours, shapes and some marks already. The average of the weights so far can be packed and looked at
at any time: --pack.
"""

import argparse
import json
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ..files import only_writer, remove_leftovers, write_atomically
from ..models.checkpoint import Checkpoint, load_checkpoint
from ..models.noise_schedule import alphas_cumprod
from ..toy import bench_world as world
from .bench_checkpoint import WEIGHTS_NAME, bench_folder
from .bench_model import LAYOUT, TOKENIZER_FOLDER, assemble
from .comfyui import find_comfyui
from .packed_weights import load_packed
from .toy_checkpoint import WEIGHTS_PATH as TOY_WEIGHTS
from .train_toy import (
    EMPTY_PROMPT_FRACTION,
    Scenes,
    as_input,
    load_or_make,
    new_unet,
    progress,
    save_weights,
    take_step,
    train_autoencoder,
)

SEED = 5
AUTOENCODER_STEPS, NUM_CROPS, CROP_PX = 700, 8000, 64
# A shard is a part of the training set, made when it is first needed; the shards take turns.
NUM_SHARDS, SHARD_PROMPTS, PICTURES_PER_PROMPT, STEPS_PER_SHARD = 8, 1024, 2, 400
STEPS, BATCH, PEAK_RATE, WARMUP, FALL_FRACTION = 8_000, 8, 3e-4, 200, 0.25
EMA_DECAY = 0.999
SAVE_EVERY, LOG_EVERY = 100, 20
# 16 MB is the most that is shipped, and the UNet has half as many weights again as the toy's.
UNET_ROUNDING = 0.27


class Training:
    """The UNet in training with its average and optimizer, kept in one file.

    Args:
        folder: holds `state.safetensors`, `log.jsonl` and the shards.
    """

    def __init__(self, folder: Path):
        self.path = folder / "state.safetensors"
        torch.manual_seed(SEED)
        self.unet = new_unet(LAYOUT).to(memory_format=torch.channels_last).train()
        self.weights = {name: weight for name, weight in self.unet.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step = 0
        if self.path.exists():
            self._load()
        else:
            self._start_from_toy()
            self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def _start_from_toy(self) -> None:
        """The toy's only level becomes the coarser one."""
        toy = load_packed(TOY_WEIGHTS)[0]["unet"]
        renamed = {name.replace("down_blocks.0.", "down_blocks.1."): weight for name, weight in toy.items()}
        for name, weight in renamed.items():
            if name in self.weights and self.weights[name].shape == weight.shape:
                self.weights[name].copy_(weight)

    def _load(self) -> None:
        tensors = load_file(self.path)
        with safe_open(self.path, "pt") as file:
            self.step = int(file.metadata()["step"])

        def placed(name: str, weight: Tensor) -> Tensor:
            # In the weight's memory format: the fused optimizer goes through memory without asking.
            return torch.empty_like(weight, requires_grad=False).copy_(tensors[name])

        self.average = {name: placed(f"average.{name}", weight) for name, weight in self.weights.items()}
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for index, (name, weight) in enumerate(self.weights.items()):
                weight.copy_(tensors[f"weight.{name}"])
                moments[index] = {key: placed(f"{key}.{name}", weight) for key in ("exp_avg", "exp_avg_sq")}
                moments[index]["step"] = torch.tensor(float(self.step))
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

    def save(self) -> None:
        """Write everything that the next steps depend on, at once."""
        tensors = {f"average.{name}": tensor for name, tensor in self.average.items()}
        for name, weight in self.weights.items():
            tensors[f"weight.{name}"] = weight.detach()
            tensors |= {f"{key}.{name}": self.optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")}
        remove_leftovers(self.path)
        with write_atomically(self.path) as temporary:
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"step": str(self.step)}
            )

    def take_step(self, latents: Tensor, texts: Tensor, steps: int) -> float:
        """Train one step on examples drawn from a shard's latents [n, k, 4, 16, 16] and texts [1 + n, 77, 768].

        Row 0 of the texts is the empty prompt's. Returns the loss.
        """
        draws = torch.Generator().manual_seed(SEED * 1_000_003 + self.step)
        prompts = torch.randint(len(latents), (BATCH,), generator=draws)
        pictures = torch.randint(latents.shape[1], (BATCH,), generator=draws)
        clean = latents[prompts, pictures].float()
        is_empty = torch.rand(BATCH, generator=draws) < EMPTY_PROMPT_FRACTION
        noise = torch.randn(clean.shape, generator=draws)
        signal_share = alphas_cumprod()
        timesteps = torch.randint(len(signal_share), (BATCH,), generator=draws)
        share = signal_share[timesteps][:, None, None, None]
        noisy = (share.sqrt() * clean + (1 - share).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        hidden = texts[torch.where(is_empty, 0, prompts + 1)]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.unet(noisy, timesteps, hidden).sample.float()
        loss = functional.mse_loss(predicted, noise)
        take_step(self.optimizer, self.unet, loss)
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), [w.detach() for w in self.weights.values()], 1 - decay)
        return float(loss.detach())


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: up, level, and in the last quarter down to nothing.

    Level, so that `steps` may be changed until that quarter begins.
    """
    fall = max(1, round(FALL_FRACTION * steps))
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP) * min(1.0, max(steps - step, 0) / fall)


def shard(folder: Path, index: int, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """Return latents [n, k, 4, 16, 16] float16 and texts [1 + n, 77, 768] bfloat16 of a part of the training set."""
    path = folder / f"shard-{index}.safetensors"
    if not path.exists():
        draws = random.Random(SEED * 1000 + index)
        examples = [world.draw_example(draws) for _ in range(SHARD_PROMPTS)]
        prompts = ["", *(prompt for _, prompt in examples)]
        first = (SEED * 1000 + index) * SHARD_PROMPTS * PICTURES_PER_PROMPT
        scenes = [scene for scene, _ in examples for _ in range(PICTURES_PER_PROMPT)]
        vae, encoder = checkpoint.load_vae().model, checkpoint.load_text_encoder()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = [
                vae.encoder(as_input(render(scenes[start : start + 16], first + start))).half()
                for start in range(0, len(scenes), 16)
            ]
            texts = [
                encoder.encode_prompts(prompts[start : start + 16])["hidden_states"].bfloat16()
                for start in range(0, len(prompts), 16)
            ]
        joined = torch.cat(latents).contiguous()
        tensors = {"latents": joined.view(SHARD_PROMPTS, PICTURES_PER_PROMPT, *joined.shape[1:])}
        with write_atomically(path) as temporary:
            save_file({**tensors, "texts": torch.cat(texts)}, temporary)
    tensors = load_file(path)
    return tensors["latents"], tensors["texts"]


def render(scenes: Sequence[world.Scene], first_seed: int) -> Tensor:
    """Return the scenes' pixels uint8 [n, 3, 128, 128]; scene i has seed `first_seed` + i."""
    pixels = np.stack([np.asarray(world.render_scene(scene, first_seed + i)) for i, scene in enumerate(scenes)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def render_crops(count: int) -> Tensor:
    """Return squares cut out of scenes, uint8 [count, 3, 64, 64]: a quarter of the pixels, a quarter of the cost."""
    draws = random.Random(SEED)
    crops = []
    for index in range(count // 4):
        whole = render([world.draw_example(draws)[0]], index)[0]
        for _ in range(4):
            top, left = (draws.randrange(0, world.SIZE_PX - CROP_PX + 1, 8) for _ in range(2))
            crops.append(whole[:, top : top + CROP_PX, left : left + CROP_PX])
    return torch.stack(crops)


def prepare(folder: Path) -> Checkpoint:
    """Return a checkpoint of the trained autoencoder and an untrained UNet, made in `folder` where it is missing."""

    def make_autoencoder() -> Any:
        crops = Scenes(render_crops(NUM_CROPS), [])
        start = {name: weight.float() for name, weight in load_packed(TOY_WEIGHTS)[0]["autoencoder"].items()}
        return train_autoencoder(crops, AUTOENCODER_STEPS, progress("autoencoder", AUTOENCODER_STEPS), start)

    autoencoder = load_or_make(folder / "autoencoder.safetensors", make_autoencoder)
    untrained = folder / "untrained.safetensors"
    if not untrained.exists():
        with write_atomically(untrained) as temporary:
            save_file(assemble(new_unet(LAYOUT).state_dict(), autoencoder), temporary)
    return load_checkpoint(untrained, tokenizer_folder=find_comfyui().joinpath(*TOKENIZER_FOLDER))


def train(folder: Path, steps: int, deadline: float, should_stop: Callable[[], bool]) -> Training:
    """Train up to `steps`, the deadline (of time.monotonic) or a wish to stop; what was reached is saved."""
    checkpoint = prepare(folder)
    training = Training(folder)
    start, seconds, recent = training.step, time.process_time(), []
    current, latents, texts = -1, torch.empty(0), torch.empty(0)
    while training.step < steps and time.monotonic() < deadline and not should_stop():
        wanted = training.step // STEPS_PER_SHARD % NUM_SHARDS
        if wanted != current:
            current, (latents, texts) = wanted, shard(folder, wanted, checkpoint)
        recent.append(training.take_step(latents, texts, steps))
        if training.step % LOG_EVERY == 0:
            spent = time.process_time() - seconds
            line = {
                "step": training.step,
                "loss": round(sum(recent) / len(recent), 4),
                "cpu_seconds": round(spent, 1),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
            with (folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            seconds, recent = time.process_time(), []
        if training.step % SAVE_EVERY == 0:
            training.save()
    if training.step > start and training.step % SAVE_EVERY:
        training.save()
    return training


def pack(folder: Path) -> Path:
    """Write the average of the weights so far as the bench's weights, and return the file."""
    state = folder / "state.safetensors"
    with safe_open(state, "pt") as file:
        step = file.metadata()["step"]
        names = [key for key in file.keys() if key.startswith("average.")]  # noqa: SIM118 (safe_open is no mapping)
        average = {name.removeprefix("average."): file.get_tensor(name) for name in names}
    recipe = (
        f"examples and draws of seed {SEED}; autoencoder: the toy's and {AUTOENCODER_STEPS} steps; UNet: the toy's and "
        f"{step} steps of {BATCH}, average {EMA_DECAY}"
    )
    path = folder / WEIGHTS_NAME
    save_weights(average, load_file(folder / "autoencoder.safetensors"), recipe, path, assemble, UNET_ROUNDING)
    return path


def main() -> None:
    """Go on with the training, or pack what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=bench_folder(), help="its folder (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so long (default: when it is done)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole training (default: %(default)s)")
    parser.add_argument("--pack", action="store_true", help="only write the weights file from what there is")
    arguments = parser.parse_args()
    if not arguments.pack:
        stopped = []
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: stopped.append(True))
        deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes is not None else float("inf")
        with only_writer(arguments.out / "state.safetensors"):
            training = train(arguments.out, arguments.steps, deadline, lambda: bool(stopped))
        print(f"step {training.step} of {arguments.steps}")
        if training.step < arguments.steps:
            return
    print(pack(arguments.out))


if __name__ == "__main__":
    main()
