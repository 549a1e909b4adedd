"""Seven SDXL-shaped rank-16 experts: our merges against a dense full-SVD replica of kohya's and against peft itself.

Compared are CPU seconds on one thread, which a busy machine hardly changes; wall time stands beside them.
Every case is a fresh process, for its peak memory. Cases that form ΔW take one layer of each shape, multiplied by how
often SDXL has it: dense SVDs of all of them take most of an hour.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safety_experts.evaluation.machine import describe_machine
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import open_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import METHODS, merge_experts

RESULT = Path(__file__).resolve().parent / "results" / "merging.json"
NUM_EXPERTS, RANK, MERGED_RANK = 7, 16, 32
NUM_BLOCKS = {640: 10, 1280: 60}  # transformer blocks of SDXL's UNet by width
CONTEXT = 2048
DENSE_METHODS = ("ties", "dare", "dare-ties", "della", "breadcrumbs", "magnitude-prune")  # they form ΔW
PEFT_COMBINATIONS = ("svd", "ties_svd", "dare_linear_svd")


def main() -> None:
    """Run every case, or the one named by --probe, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probe", nargs=2, metavar=("CASE", "FOLDER"), help="run one case and print JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.probe:
        print(json.dumps(probe(*arguments.probe)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for number in range(NUM_EXPERTS):
            save_expert(make_expert(number), Path(folder) / f"expert_{number}.safetensors")
        cases = {}
        for case in [*(f"ours {name}" for name in METHODS if name not in ("slerp", "fitted")), "dense", "peft"]:
            command = [sys.executable, __file__, "--probe", case, folder]
            cases[case] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            print(case, cases[case], flush=True)
    dense_seconds, linear_seconds = cases["dense"]["cpu_seconds"], cases["ours linear"]["cpu_seconds"]
    result = {
        "claims": {
            "linear_times_faster_than_dense": round(dense_seconds / linear_seconds),
            "svd_times_faster_than_dense": round(dense_seconds / cases["ours svd"]["cpu_seconds"]),
            "svd_relative_error_against_true_truncation": cases["dense"]["our_relative_error"],
            "co_merge_time_of_linear": round(cases["ours co-merge"]["cpu_seconds"] / linear_seconds, 2),
            "peak_memory_gb": {case: cases[f"ours {case}"]["peak_memory_gb"] for case in ("linear", "svd", "co-merge")},
        },
        "setting": f"{NUM_EXPERTS} experts of rank {RANK} on SDXL's {num_layers()} attention layers, float32, merged "
        f"at rank {MERGED_RANK} where ranks do not add up",
        "cases": cases,
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
        **describe_machine("peft"),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["claims"], indent=2))


def sdxl_layers() -> dict[str, tuple[int, int]]:
    """Return layer name -> (out, in) of SDXL's attention layers."""
    layers = {}
    for width, num_blocks in NUM_BLOCKS.items():
        for block in range(num_blocks):
            for attention, context in (("attn1", width), ("attn2", CONTEXT)):
                for projection, inner in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out_0", width)):
                    layers[f"lora_unet_width_{width}_block_{block}_{attention}_{projection}"] = (width, inner)
    return layers


def num_layers() -> int:
    return len(sdxl_layers())


def one_of_each_shape() -> dict[tuple[int, int], tuple[str, int]]:
    """Return shape -> (a layer's name, how many layers have that shape)."""
    shapes = list(sdxl_layers().values())
    return {shape: (name, shapes.count(shape)) for name, shape in sdxl_layers().items()}


def make_expert(number: int) -> Expert:
    generator = torch.Generator().manual_seed(number)
    layers = {
        name: LoraLayer(
            torch.randn(RANK, inner, generator=generator) / RANK,
            torch.randn(out, RANK, generator=generator) / 100,
            float(RANK),
        )
        for name, (out, inner) in sdxl_layers().items()
    }
    return Expert(layers, ExpertInfo(categories=[f"category {number}"]), f"expert_{number}")


def probe(case: str, folder: str) -> dict:
    """Return seconds (wall), CPU seconds and peak memory of one case."""
    experts = [open_expert(path) for path in sorted(Path(folder).glob("*.safetensors"))]
    if case == "dense":
        return dense_case(experts)
    if case == "peft":
        return peft_case(experts)
    method = case.removeprefix("ours ")
    known = {parameter.name for parameter in METHODS[method].parameters}
    rows = {name: out for name, (out, _) in sdxl_layers().items()}
    generator = torch.Generator().manual_seed(0)
    counts = {name: torch.randint(0, 4096, (len(experts), out), generator=generator) for name, out in rows.items()}
    if method in DENSE_METHODS:
        return dense_method_case(experts, method)
    clock = Clock()
    with clock:
        parameters = {"rank": MERGED_RANK} if "rank" in known else {}
        merge_experts(experts, method, parameters=parameters, activation_counts=counts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {**clock.result(), "peak_memory_gb": round(peak, 2)}


class Clock:
    """Adds up wall and CPU seconds spent inside, each stretch times `count`."""

    def __init__(self):
        self.seconds = self.cpu_seconds = 0.0
        self.count = 1

    def times(self, count: int) -> "Clock":
        self.count = count
        return self

    def __enter__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_) -> None:
        self.seconds += self.count * (time.perf_counter() - self._wall)
        self.cpu_seconds += self.count * (time.process_time() - self._cpu)

    def result(self) -> dict:
        return {"cpu_seconds": round(self.cpu_seconds, 2), "seconds": round(self.seconds, 2)}


def dense_method_case(experts: list[Expert], method: str) -> dict:
    """One of our methods that form ΔW."""
    clock = Clock()
    for name, count in one_of_each_shape().values():
        alone = [Expert({name: expert.layers[name]}) for expert in experts]
        with clock.times(count):
            merge_experts(alone, method, parameters={"rank": MERGED_RANK})
    return {**clock.result(), "extrapolated_from_layers": len(one_of_each_shape())}


def dense_case(experts: list[Expert]) -> dict:
    """What kohya's svd_merge_lora computes: ΔW in full, its full SVD, the head clamped at the 99th percentile."""
    clock, error, clamped_error = Clock(), 0.0, 0.0
    for name, count in one_of_each_shape().values():
        with clock.times(count):
            layers = [expert.layers[name] for expert in experts]
            weight = sum(layer.up @ layer.down * (layer.alpha / layer.rank) for layer in layers)
            u, s, vh = torch.linalg.svd(weight)
            up, down = u[:, :MERGED_RANK] @ torch.diag(s[:MERGED_RANK]), vh[:MERGED_RANK]
            limit = torch.cat([up.flatten(), down.flatten()]).quantile(0.99)
            up, down = up.clamp(-limit, limit), down.clamp(-limit, limit)
        clamped = up @ down

        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        best = (u[:, :MERGED_RANK] * s[:MERGED_RANK]) @ vh[:MERGED_RANK]
        alone = [Expert({name: expert.layers[name]}) for expert in experts]
        ours = merge_experts(alone, "svd", parameters={"rank": MERGED_RANK}).layers[name].delta()
        error = max(error, float((ours - best).norm() / best.norm()))
        clamped_error = max(clamped_error, float((clamped - best).norm() / best.norm()))
    return {
        **clock.result(),
        "our_relative_error": float(f"{error:.2g}"),
        "clamped_relative_error": float(f"{clamped_error:.2g}"),
        "extrapolated_from_layers": len(one_of_each_shape()),
    }


def peft_case(experts: list[Expert]) -> dict:
    """peft's add_weighted_adapter, by combination type."""
    from peft import LoraConfig, get_peft_model

    clocks = {combination: Clock() for combination in PEFT_COMBINATIONS}
    names = [str(number) for number in range(len(experts))]
    for (out, inner), (layer_name, count) in one_of_each_shape().items():
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
        model = torch.nn.Sequential(torch.nn.Linear(inner, out, bias=False))
        adapted = get_peft_model(model, config, adapter_name=names[0])
        for name, expert in zip(names, experts, strict=True):
            if name != names[0]:
                adapted.add_adapter(name, config)
            adapted.base_model.model[0].lora_A[name].weight.data = expert.layers[layer_name].down
            adapted.base_model.model[0].lora_B[name].weight.data = expert.layers[layer_name].up
        for combination, clock in clocks.items():
            density = {} if combination == "svd" else {"density": 0.5}
            options = {"combination_type": combination, "svd_rank": MERGED_RANK, **density}
            with clock.times(count):
                adapted.add_weighted_adapter(names, [1.0] * len(names), combination, **options)
    results = {combination: clock.result() for combination, clock in clocks.items()}
    return {**results, "extrapolated_from_layers": len(one_of_each_shape())}


if __name__ == "__main__":
    main()
