"""What an expert costs while sampling, in the real ComfyUI: SafetyExpertsApply against the stock LoRA loader.

Every case samples in turn, each round beginning with another one, so that a slow minute slows all of them; what is
compared are medians. Loading (which patches weights) is timed apart from sampling. On a CPU it is the toy checkpoint
on one thread, compared by CPU seconds, which a busy machine hardly changes; with CUDA also SD1.5's UNet with random
weights (which take as long as trained ones), compared by wall time, on a quiet machine.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.evaluation.machine import describe_machine
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.merging import merge_experts
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.toy.world import prompt_for, taxonomy

RESULT = Path(__file__).resolve().parent / "results" / "sampling.json"
CATEGORIES, RANK = ("hate", "violence"), 16
SAFE, UNSAFE = prompt_for("red", "circle"), prompt_for("red", "circle", "stripes")
SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768, "num_heads": 8,
    "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip


def main() -> None:
    """Time every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="samplings of each case (default: 15)")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps (default: 12)")
    parser.add_argument("--sd15-size", type=int, metavar="PX", help="also SD1.5's UNet (default with CUDA: 512)")
    parser.add_argument("--out", type=Path, default=RESULT, help=f"JSON to write (default: {RESULT})")
    arguments = parser.parse_args()
    sys.path[0] = str(find_comfyui())
    sys.argv[1:] = []
    import comfy.cli_args
    import comfyui_version

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    torch.set_num_threads(1)
    models = {"toy, 64 px": (load_toy, 64)}
    if size_px := arguments.sd15_size or (512 if torch.cuda.is_available() else 0):
        models[f"SD1.5 (random weights), {size_px} px"] = (load_sd15, size_px)
    measured = {}
    with torch.inference_mode():
        for name, (load, size_px) in models.items():
            model, clip = load()
            measured[name] = measure(model, clip, size_px, arguments.steps, arguments.rounds)
            print(name, json.dumps(measured[name], indent=2), flush=True)
    result = {
        "claims": {
            f"{name}: {case}": times["times_of_stock"]
            for name, cases in measured.items()
            for case, times in cases.items()
        },
        "setting": f"merge of {len(CATEGORIES)} experts of rank {RANK} on every attention layer, {arguments.steps} "
        f"euler steps, cfg 3, batch 1, medians of {arguments.rounds} interleaved samplings, in the dtype ComfyUI picks",
        "models": measured,
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
        "comfyui": comfyui_version.__version__,
        **describe_machine(),
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["claims"], indent=2))


def load_toy():
    """Return ComfyUI's model and text encoder of the toy checkpoint."""
    import comfy.sd

    model, clip, *_ = comfy.sd.load_checkpoint_guess_config(str(ensure_toy_checkpoint()))
    return model, clip


def load_sd15():
    """Return a ComfyUI model with SD1.5's shapes and random weights, and the toy text encoder."""
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        shapes = UNetModel(**SD15, operations=comfy.ops.disable_weight_init).state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, value in shapes.items():
        numbers = torch.randn(value.shape, generator=generator)
        numbers = numbers / value.shape[1:].numel() ** 0.5 if value.ndim > 1 else torch.full(value.shape, 0.5)
        weights[key] = numbers.half()
    return comfy.sd.load_diffusion_model_state_dict(weights), load_toy()[1]


def measure(model, clip, size_px: int, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return median seconds of every case, and its sampling as a multiple of the stock loader's."""
    import comfy.model_management

    import nodes

    conditions = {prompt: encode(clip, prompt) for prompt in (SAFE, UNSAFE, "")}
    latent = {"samples": torch.zeros(1, 4, size_px // 8, size_px // 8)}
    cases = make_cases(model, clip)
    seconds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
    for round_number in range(rounds + 1):
        first = round_number % len(cases)
        for name, (patched, prompt) in [*cases.items()][first:] + [*cases.items()][:first]:
            started = time.perf_counter()
            comfy.model_management.load_models_gpu([patched])
            loaded, loaded_cpu = time.perf_counter(), time.process_time()
            sampled = nodes.common_ksampler(
                patched, round_number, steps, 3.0, "euler", "normal", conditions[prompt], conditions[""], latent
            )
            sampled[0]["samples"].sum().item()  # waits for the GPU
            if round_number:  # the first one warms up
                now = time.perf_counter(), time.process_time()
                seconds[name].append((loaded - started, now[0] - loaded, now[1] - loaded_cpu))
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in seconds.items()
    }
    compared = 1 if torch.cuda.is_available() else 2
    return {
        name: {
            "loading_seconds": round(times[0], 4),
            "sampling_seconds": round(times[1], 4),
            "sampling_cpu_seconds": round(times[2], 4),
            "times_of_stock": round(times[compared] / medians["stock loader"][compared], 3),
        }
        for name, times in medians.items()
    }


def make_cases(model, clip) -> dict:
    """Return name -> (model, prompt): without an expert, by the stock loader, and by ours in every manner."""
    import comfy.lora
    import comfy.sd
    import comfy.utils
    from safety_experts.nodes.applying import SafetyExpertsApply
    from safety_experts.nodes.concept_gate import SafetyExpertsConceptGate

    shapes = attention_shapes(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "merged.safetensors"
        experts = [make_expert(seed, category, shapes) for seed, category in enumerate(CATEGORIES)]
        save_expert(merge_experts(experts, "linear"), path)
        stock, _ = comfy.sd.load_lora_for_models(model, clip, comfy.utils.load_torch_file(str(path)), 1.0, 1.0)
        merged = load_expert(path)

    def apply(**inputs):
        every = ("hate", "harassment", "violence", "self_harm", "sexual", "shocking", "illegal_activity", "other")
        return SafetyExpertsApply.execute(model, clip, merged, **dict.fromkeys(every, 1.0), **inputs).result[0]

    pairs = expand_taxonomy(taxonomy(CATEGORIES, 6))
    gate, report = SafetyExpertsConceptGate.execute(clip, pairs, 0.0, 6).result
    print(report)
    return {
        "no expert": (model, UNSAFE),
        "stock loader": (stock, UNSAFE),
        "apply": (apply(), UNSAFE),
        "apply in a part of the sampling, all steps within": (apply(end_percent=0.99), UNSAFE),
        "apply in a part of the sampling, no step within": (apply(start_percent=0.99, end_percent=0.995), UNSAFE),
        "apply behind a gate, unsafe prompt": (apply(gate=gate), UNSAFE),
        "apply behind a gate, safe prompt": (apply(gate=gate), SAFE),
    }


def attention_shapes(model) -> dict[str, tuple[int, int]]:
    """Return layer name -> (out, in) of every attention projection of a ComfyUI model."""
    import comfy.lora
    import comfy.utils

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    ends = tuple(f"attn{number}_to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out_0"))
    found = {name: key for name, key in keys.items() if name.startswith("lora_unet_") and name.endswith(ends)}
    by_key = {key: name for name, key in sorted(found.items(), reverse=True)}  # one spelling of each
    return {name: tuple(comfy.utils.get_attr(model.model, key).shape) for key, name in by_key.items()}


def make_expert(seed: int, category: str, shapes: dict[str, tuple[int, int]]) -> Expert:
    """Return a random expert that changes the image a little."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraLayer(
            torch.randn(RANK, width, generator=generator) / width**0.5,
            0.01 * torch.randn(out, RANK, generator=generator),
            float(RANK),
        )
        for name, (out, width) in shapes.items()
    }
    return Expert(layers, ExpertInfo(categories=[category]), category)


def encode(clip, prompt: str) -> list:
    """Return what CLIPTextEncode returns."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


if __name__ == "__main__":
    main()
