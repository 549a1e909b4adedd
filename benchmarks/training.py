"""Training steps a second and peak memory: the published SafetyDPO step against ours, one speed-up after the other.

    python benchmarks/training.py                      the toy model, on a CPU or a GPU
    python benchmarks/training.py --model sd15 --device cuda
    python benchmarks/training.py --model sdxl --device cuda

All weights are random and all pairs synthetic: speed does not depend on them. The replica is written from the method's
description (methods §1.1-1.2): a second frozen UNet as reference, VAE and text encoder in every step, half precision
weights and autocast, AdamW; SDXL with Adafactor, gradient checkpointing, and VAE, text encoders and reference offloaded
to the CPU. Every case is a fresh process, for its peak memory, and cases take turns; medians of the rounds count.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safety_experts.evaluation.machine import describe_machine
from safety_experts.preferences.dataset import PreferencePair
from safety_experts.training.batches import BatchPlan
from safety_experts.training.denoiser import UNetDenoiser
from safety_experts.training.preparation import prepare_policy
from safety_experts.training.recipe import Recipe
from safety_experts.training.reference_bank import ReferenceBank
from safety_experts.training.run import TrainingRun
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).resolve().parent / "results"
CASES = {
    "replica": "second UNet, VAE and text encoder in every step",
    "adapter off": "one UNet; the reference is the same UNet with its LoRA off",
    "cached": "latents and text embeddings from a cache as well",
    "ours": "the shipped trainer: the same, the base model in the compute dtype, the device's fastest attention",
    "ours, reference bank": "draws repeat after two epochs, so the reference runs once for each; filling it counts",
    "ours, low memory": "ours with gradient checkpointing",
}
GPU_CASES = {"ours, compiled": "ours, reference bank, and torch.compile"}
WARMUP_STEPS = 2
NUM_PAIRS = 48


@dataclass(frozen=True)
class Shape:
    """A model family to build with random weights."""

    size_px: int
    context_dim: int
    unet: dict
    is_tiny_vae: bool = False
    num_text_towers: int = 1


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


def main() -> None:
    """Time every case of one model and write the result; `--case` times one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="toy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="pairs a step (default: 8 for the toy model, else 4)")
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each case, of 48 pairs")
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is timed")
    parser.add_argument("--case", choices=CASES | GPU_CASES, help="time this case only and print JSON")
    arguments = parser.parse_args()
    batch_size = arguments.batch_size or (8 if arguments.model == "toy" else 4)
    if arguments.case:
        device = torch.device(arguments.device)
        print(json.dumps(time_case(arguments.case, arguments.model, device, batch_size, arguments.steps)))
        return
    wanted = CASES | GPU_CASES if torch.device(arguments.device).type == "cuda" else CASES
    rounds = []
    for _ in range(arguments.rounds):
        rounds.append({case: in_a_process(case, arguments, batch_size) for case in wanted})
    cases = {case: {"what": what, **median_of([found[case] for found in rounds])} for case, what in wanted.items()}
    replica = cases["replica"]
    result = {
        "claims": {
            case: {
                "times_faster_than_the_replica": round(found["pairs_per_second"] / replica["pairs_per_second"], 2),
                "memory_as_part_of_the_replicas": round(found["peak_memory_gb"] / replica["peak_memory_gb"], 2),
            }
            for case, found in cases.items()
            if case.startswith("ours")
        },
        "setting": f"{arguments.model}, {SHAPES[arguments.model].size_px} px, batches of {batch_size} pairs, rank 4, "
        f"{arguments.steps} timed steps after {WARMUP_STEPS}, {arguments.device}, medians of {arguments.rounds} rounds",
        "cases": cases,
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
        **describe_machine("diffusers", "peft", "transformers"),
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"training_{arguments.model}_{torch.device(arguments.device).type}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["claims"], indent=2))


def in_a_process(case: str, arguments: argparse.Namespace, batch_size: int) -> dict:
    """Return what `time_case` measures, in a process of its own."""
    command = [sys.executable, __file__, "--model", arguments.model, "--device", arguments.device]
    command += ["--batch-size", str(batch_size), "--steps", str(arguments.steps), "--case", case]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(f"{case}: {output.splitlines()[-1]}", flush=True)
    return json.loads(output.splitlines()[-1])


def median_of(rounds: list[dict]) -> dict:
    """Return the median of each number, pairs a second of every round, and where time goes in the last."""
    medians = {
        name: value if isinstance(value, dict) else statistics.median(found[name] for found in rounds)
        for name, value in rounds[-1].items()
    }
    return {**medians, "pairs_per_second_of_each_round": [found["pairs_per_second"] for found in rounds]}


def time_case(case: str, model: str, device: torch.device, batch_size: int, steps: int) -> dict:
    """Return pairs a second, peak memory, the part of the device's matrix rate in use, and where the time goes."""
    torch.manual_seed(0)
    start_over = None
    if case.startswith("ours"):
        step, start_over = our_step(SHAPES[model], device, batch_size, case)
    else:
        step = replica_step(
            SHAPES[model], device, batch_size, has_second_unet=case == "replica", is_cached=case == "cached"
        )
    for _ in range(WARMUP_STEPS):
        step()
    if start_over:
        start_over()
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if is_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    peak = torch.cuda.max_memory_allocated() if is_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with FlopCounterMode(display=False) as counter:  # with a reference bank, of a step that finds its predictions there
        step()
    rate = matrix_rate(device)
    return {
        "pairs_per_second": round(batch_size / seconds, 3),
        "seconds_per_step": round(seconds, 4),
        "peak_memory_gb": round(peak / 1e9, 3),
        "teraflop_per_step": round(counter.get_total_flops() / 1e12, 4),
        "flops_utilisation": round(counter.get_total_flops() / seconds / rate, 3),
        "floor_seconds_per_step": round(counter.get_total_flops() / rate, 4),
        "milliseconds_per_step": where_time_goes(step, is_gpu),
    }


def where_time_goes(step: Callable[[], None], is_gpu: bool) -> dict[str, float]:
    """Return the operations that take most of a step, in ms."""
    from torch.profiler import ProfilerActivity, profile

    num_steps = 3
    with profile(activities=[ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(num_steps):
            step()
    spent = {
        event.key: event.self_device_time_total if is_gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    largest = sorted(spent, key=lambda key: -spent[key])[:10]
    return {key: round(spent[key] / 1000 / num_steps, 2) for key in largest}


def matrix_rate(device: torch.device) -> float:
    """Return the measured bfloat16 matrix rate of a device in FLOP/s."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    a @ b
    start, repeats = time.perf_counter(), 10
    for _ in range(repeats):
        product = a @ b
    float(product[0, 0])  # waits for the device
    return repeats * 2 * size**3 / (time.perf_counter() - start)


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
    if shape.num_text_towers == 1:
        return None
    sizes = torch.tensor([shape.size_px, shape.size_px, 0, 0, shape.size_px, shape.size_px], device=device)
    return {"text_embeds": torch.zeros(rows, 1280, device=device), "time_ids": sizes.float().expand(rows, -1)}


def replica_step(
    shape: Shape, device: torch.device, batch_size: int, *, has_second_unet: bool, is_cached: bool
) -> Callable[[], None]:
    """Return a function that takes one step as the published code describes it."""
    half = torch.float16 if device.type == "cuda" else torch.bfloat16  # a CPU's autocast is fast in bfloat16 only
    is_sdxl = shape.num_text_towers == 2
    unet = build_unet(shape, device, half)
    reference = copy.deepcopy(unet) if has_second_unet else unet
    parameters = add_peft_lora(unet)
    if is_sdxl:
        unet.train()
        unet.enable_gradient_checkpointing()
    optimizer = adafactor(parameters) if is_sdxl else torch.optim.AdamW(parameters, lr=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=half is torch.float16)
    vae, texts = (None, []) if is_cached else build_encoders(shape, device, half)
    if is_sdxl:
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


class SyntheticCache:
    """Random latents and conditions where the trainer expects the cache of a dataset."""

    def __init__(self, shape: Shape):
        size = shape.size_px // 8
        self._latents = torch.randn(2, 4, size, size)
        self._conditions = {"hidden_states": torch.randn(77, shape.context_dim)}
        if shape.num_text_towers == 2:
            self._conditions["pooled"] = torch.randn(1280)

    def latents(self, pair: PreferencePair, *, flipped: bool = False) -> tuple[Tensor, Tensor]:
        return self._latents[0], self._latents[1]

    def conditions(self, prompts: list[str]) -> dict[str, Tensor]:
        return {name: value.expand(len(prompts), *value.shape) for name, value in self._conditions.items()}


def our_step(
    shape: Shape, device: torch.device, batch_size: int, case: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return (a function that takes one step of the shipped trainer, one that empties what it remembers)."""
    has_bank = case in ("ours, reference bank", "ours, compiled")
    recipe = Recipe(
        batch_size=batch_size,
        accumulation_steps=1,
        steps=10_000,
        gradient_checkpointing="low memory" in case,
        warmup_steps=0,
        reference_epochs=2 if has_bank else 0,
        compile="compiled" in case,
    )
    unet = build_unet(shape, device, torch.bfloat16)
    prepare_policy(unet, recipe, [], device)
    pair = PreferencePair("pair", "a prompt", "a safe prompt", ("violence",), "c.png", "r.png", False, True, 0, 8, 8)
    denoiser = UNetDenoiser(unet, torch.linspace(0.999, 0.005, 1000), "epsilon", torch.bfloat16)
    run = TrainingRun(unet, denoiser, BatchPlan([pair] * NUM_PAIRS, SyntheticCache(shape), recipe), recipe, device)

    def start_over() -> None:
        run.records = []
        run.bank = ReferenceBank() if has_bank else None

    start_over()
    return lambda: run.take_step(lambda: False), start_over


if __name__ == "__main__":
    main()
