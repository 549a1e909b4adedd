"""Training steps a second and peak memory: the published SafetyDPO step against ours, one speed-up after the other.

    python benchmarks/training.py                      the toy model, on a CPU or a GPU
    python benchmarks/training.py --model sd15 --device cuda
    python benchmarks/training.py --model sdxl --device cuda

All weights are random and all pairs synthetic: speed does not depend on them. published_step.py is the replica. Every
case is a fresh process, for its peak memory, and cases take turns; medians of the rounds count.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from published_step import SHAPES, Shape, build_unet, replica_step
from safety_experts.evaluation.machine import describe_machine
from safety_experts.models.denoiser import UNetDenoiser
from safety_experts.preferences.dataset import PreferencePair
from safety_experts.training.batches import BatchPlan
from safety_experts.training.policy import LoraPolicy
from safety_experts.training.preparation import prepare_policy
from safety_experts.training.recipe import Recipe
from safety_experts.training.reference_bank import ReferenceBank
from safety_experts.training.run import TrainingRun
from torch import Tensor
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


class SyntheticCache:
    """Random latents and conditions where the trainer expects the cache of a dataset."""

    def __init__(self, shape: Shape):
        size = shape.size_px // 8
        self._latents = torch.randn(2, 4, size, size)
        self._conditions = {"hidden_states": torch.randn(77, shape.context_dim)}
        if shape.is_sdxl:
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
    run = TrainingRun(
        LoraPolicy(denoiser, recipe.lora_alpha),
        BatchPlan([pair] * NUM_PAIRS, SyntheticCache(shape), recipe),
        recipe,
        device,
    )

    def start_over() -> None:
        run.records = []
        run.bank = ReferenceBank() if has_bank else None

    start_over()
    return lambda: run.take_step(lambda: False), start_over


if __name__ == "__main__":
    main()
