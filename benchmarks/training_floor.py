"""What a training step of SD1.5 and SDXL computes and keeps by each recipe as it ships, counted instead of timed.

    python benchmarks/training_floor.py

No GPU is needed. The exit code is 1 if a recipe of its family computes more a pair than the published step. The models
of benchmarks/published_step.py run on fake tensors; every matrix product, convolution and attention is counted, and
every tensor while it lives. What `training.py` shows on a GPU beyond the ratio of the counts is better use of the
device. Not counted: convolution workspaces, fragmentation and the CUDA context.
"""

import contextlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from published_step import SHAPES, Shape, added_conditions, build_encoders, build_unet
from safety_experts.evaluation.machine import describe_machine
from safety_experts.training.preparation import prepare_policy
from safety_experts.training.recipe import Recipe, load_recipe
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_backward_flop, sdpa_flop

RESULT = Path(__file__).resolve().parent / "results" / "training_floor.json"
META, CPU = torch.device("meta"), torch.device("cpu")
# A fake CPU's attention stands for a GPU's: the same algorithm, which keeps no matrix of scores.
register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, get_raw=True)(sdpa_flop)
register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, get_raw=True)(
    sdpa_backward_flop
)


@dataclass(frozen=True)
class Case:
    """A way of taking a step. Offloaded: encoders and reference lie on the CPU, and only their activations count."""

    has_encoders: bool = False
    has_second_unet: bool = False
    is_offloaded: bool = False
    has_checkpointing: bool = False
    reference_share: float = 1.0
    pairs: int = 4
    anchor_every: int = 0  # forward passes; 0: no anchor


def as_shipped(name: str, *overrides: str, reference_share: float = 1.0) -> Case:
    """Return the step of a recipe. The SFT term is of predictions that are made anyway: it costs nothing."""
    recipe = load_recipe(name, overrides)
    return Case(
        has_checkpointing=recipe.gradient_checkpointing,
        reference_share=reference_share,
        pairs=recipe.batch_size,
        anchor_every=recipe.anchor_every if recipe.anchor_weight else 0,
    )


REPLICA = "published step"
# Kept for 10 epochs of which the first 2 are new draws.
BANK = "recipe {}, with reference_epochs=2, 10 epochs long"
MODELS = {
    "sd15": {
        REPLICA: Case(has_encoders=True, has_second_unet=True),
        "recipe alignguard": as_shipped("alignguard"),
        "recipe sd15": as_shipped("sd15"),
        BANK.format("sd15"): as_shipped("sd15", reference_share=0.2),
        "recipe low-vram": as_shipped("low-vram"),
        "recipe sd15 with anchor_every=1": as_shipped("sd15", "anchor_every=1"),
    },
    "sdxl": {
        REPLICA: Case(True, True, is_offloaded=True, has_checkpointing=True),
        "recipe sdxl": as_shipped("sdxl"),
        BANK.format("sdxl"): as_shipped("sdxl", reference_share=0.2),
        "recipe low-vram": as_shipped("low-vram"),
        "recipe sdxl without gradient_checkpointing": as_shipped("sdxl", "gradient_checkpointing=false"),
        "recipe sdxl with anchor_every=1": as_shipped("sdxl", "anchor_every=1"),
    },
}
OF_FAMILY = {"sd15": ("alignguard", "sd15", "low-vram"), "sdxl": ("sdxl", "low-vram")}


def main() -> None:
    """Count every case of both models and write the result."""
    models = {}
    for model, cases in MODELS.items():
        counts = {name: count(SHAPES[model], case) for name, case in cases.items()}
        replica_flops, replica_memory = counts[REPLICA]
        models[model] = {
            name: {
                "teraflop_per_pair": round(flops, 2),
                "as_part_of_the_published_steps": round(flops / replica_flops, 2),
                "expected_speed": round(replica_flops / flops, 2),
                "peak_memory_gb": round(memory, 2),
                "memory_as_part_of_the_published_steps": round(memory / replica_memory, 2),
            }
            for name, (flops, memory) in counts.items()
        }
    is_met = all(
        models[model][f"recipe {name}"]["as_part_of_the_published_steps"] <= 1
        for model, names in OF_FAMILY.items()
        for name in names
    )
    result = {
        "what": __doc__.splitlines()[0],
        "target": "no recipe of its family computes more a pair than the published step",
        "is_met": is_met,
        "notes": "expected_speed is the ratio of the counts: what is expected where a device computes as well in both; "
        "memory is that of the largest forward pass with its gradients, the one with anchor rows",
        "models": models,
        **describe_machine("diffusers", "peft"),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(models, indent=2))
    raise SystemExit(not is_met)


def count(shape: Shape, case: Case) -> tuple[float, float]:
    """Return (TFLOP a pair, peak memory in GB) of a step up to its gradients."""

    def operations(rows: int) -> float:
        (encoding, reference, policy), _ = pretend_step(shape, case, rows, 1, FlopCounterMode(display=False))
        return encoding + case.reference_share * reference + policy

    flops = operations(2)
    if case.anchor_every:  # a third row, in one forward pass of so many
        flops += (operations(3) - flops) / case.anchor_every
    # Apart: the counter keeps tensors of checkpointed layers alive.
    _, peak = pretend_step(shape, case, (3 if case.anchor_every else 2) * case.pairs, case.pairs, None)
    return flops / 1e12, peak / 1e9


def pretend_step(
    shape: Shape, case: Case, rows: int, pairs: int, counter: FlopCounterMode | None
) -> tuple[list[int], int]:
    """Return (FLOP of encoding, of the reference, and of the policy's two ways; peak bytes) of a batch of `rows`."""
    unet = build_unet(shape, META, torch.bfloat16)
    prepare_policy(unet, Recipe(rank=4, gradient_checkpointing=case.has_checkpointing), [], META)
    others = [build_unet(shape, META, torch.bfloat16)] if case.has_second_unet else []
    reference = others[0] if others else unet
    vae, texts = build_encoders(shape, META, torch.bfloat16)
    others += [vae, *texts] if case.has_encoders else []
    size = shape.size_px // 8
    flops: list[int] = []

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        with counter or contextlib.nullcontext():
            yield
        flops.append(counter.get_total_flops() if counter else 0)

    with FakeTensorMode():
        pretend([unet, *others])
        memory = LiveMemory()
        for model in [unet, *([] if case.is_offloaded else others)]:
            for weight in model.parameters():
                memory.track(weight)
        inputs = {
            "sample": torch.zeros(rows, 4, size, size),
            "timestep": torch.zeros(rows),
            "encoder_hidden_states": torch.zeros(rows, 77, shape.context_dim, dtype=torch.bfloat16),
            "added_cond_kwargs": added_conditions(shape, rows, CPU),
        }
        with memory, torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad(), counted():
                if case.has_encoders:
                    vae.encode(torch.zeros(rows, 3, shape.size_px, shape.size_px, dtype=torch.bfloat16))
                    for text in texts:
                        text(torch.zeros(pairs, 77, dtype=torch.long))
            with torch.no_grad(), counted():
                reference(**inputs)
            with counted():
                unet(**inputs).sample.sum().backward()
    return flops, memory.peak


class LiveMemory(TorchDispatchMode):
    """Inside, adds up the bytes of all tensors that are alive.

    Attributes:
        peak: the most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.track, result)
        return result

    def track(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return tensor

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.live -= num_bytes


def pretend(models: list[torch.nn.Module]) -> None:
    """Inside a FakeTensorMode, put tensors that pretend to be on a CPU in place of those without a device."""
    for module in (module for model in models for module in model.modules()):
        for name, weight in module.named_parameters(recurse=False):
            pretended = torch.empty(weight.shape, dtype=weight.dtype)
            module._parameters[name] = torch.nn.Parameter(pretended, requires_grad=weight.requires_grad)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


if __name__ == "__main__":
    main()
