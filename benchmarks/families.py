"""Train every family of models that ComfyUI can load, as a tiny random model on a CPU, through the native path.

    COMFYUI_PATH=<ComfyUI> python benchmarks/families.py [--only sd15,flux1] [--out benchmarks/results/families.json]

For each: the reference is bit for bit the model without adapters; the gradient of the DPO loss is that of float64
finite differences and of plain autograd on saved copies, also where the model stays in RAM; two steps lower the
loss on fixed noise; the saved file loads in stock LoraLoaderModelOnly with every key and gives what the adapters gave,
under diffusers' names too; Co-Merge counts alike over fused layers and split ones. Exit 1 if one is not so.
"""

import argparse
import json
import math
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from family_cases import ARGUMENTS, CASES, Case, random_model  # it sets ComfyUI up

# isort: split
import comfy.model_management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.errors import InputError
from safety_experts.evaluation.machine import describe_machine
from safety_experts.experts.co_merge import ActivationCounter
from safety_experts.experts.expert import Expert
from safety_experts.experts.expert_file import load_expert, save_diffusers, save_expert
from safety_experts.experts.fused import in_one_spelling, native_family, split_layer, with_split_layers
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import TRANSFORMER_PREFIX, kohya_name
from safety_experts.nodes.calibration import watch
from safety_experts.nodes.native import identity
from safety_experts.nodes.native.adapters import target_layers
from safety_experts.nodes.native.denoiser import NativeDenoiser
from safety_experts.nodes.native.policy import NativePolicy
from safety_experts.nodes.native.verification import check_loads
from safety_experts.training.recipe import load_recipe
from torch import Tensor, nn

CPU = torch.device("cpu")
# Families whose diffusers' names stock ComfyUI reads too; its own tables for the others are missing or of other sizes.
DIFFUSERS = ("sd3", "flux1", "flux2-klein", "z-image", "qwen-image")
BETA, TOKENS = 5.0, (7, 7, 5)  # of chosen and rejected, and of the prompt of a second pair


def build(case: Case, dtype: torch.dtype) -> ModelPatcher:
    """Return the tiny model as a loader in a graph leaves it: made in inference mode."""
    with torch.inference_mode():
        model = random_model(case, dtype)
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


class Batch:
    """Two pairs under two prompts of different length: [chosen, chosen, rejected, rejected]."""

    def __init__(self, case: Case, model, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(1)

        def draw() -> Tensor:
            return torch.randn(2, *case.latents, generator=generator)

        latents = [model.process_latent_in(draw()) for _ in range(2)]
        noise = draw()
        torch.manual_seed(2)
        rows = []
        for tokens in (7, 5):
            extra = {name: make(tokens).to(dtype) for name, make in case.extra.items()}
            rows.append({"cross_attn": torch.randn(tokens, case.text_dim, dtype=dtype), **extra})
        self.latents = torch.cat(latents).to(dtype)
        self.noise = torch.cat([noise, noise]).to(dtype)
        self.timesteps = torch.tensor([333, 600, 333, 600])
        self.rows = {name: [row[name] for row in rows] * 2 for name in rows[0]}


def loss_of(policy: NativePolicy, batch: Batch, reference: Tensor) -> Tensor:
    denoiser = policy.denoiser
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.timesteps)
    target = denoiser.target(batch.latents, batch.noise, batch.timesteps)
    predicted = denoiser.predict(noisy, batch.timesteps, batch.rows)
    errors = [(value.double() - target).square().flatten(1).mean(1) for value in (predicted, reference)]
    chosen, rejected = (errors[0] - errors[1]).chunk(2)
    return -nn.functional.logsigmoid(-(BETA / 2) * (chosen - rejected)).mean()


def gradient(policy: NativePolicy, loss: Tensor) -> Tensor:
    for parameter in policy.parameters.values():
        parameter.grad = None
    loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters.values()]
    return torch.cat([part.flatten().double() for part in parts])


@contextmanager
def moved(policy: NativePolicy, direction: Tensor, step: float) -> Iterator[None]:
    def add(amount: float) -> None:
        start = 0
        for parameter in policy.parameters.values():
            stop = start + parameter.numel()
            parameter.data.add_(direction[start:stop].view_as(parameter), alpha=amount)
            start = stop

    add(step)
    try:
        yield
    finally:
        add(-step)


def open_policy(
    case: Case, dtype: torch.dtype, patcher: ModelPatcher | None = None
) -> tuple[NativePolicy, Batch, Tensor, Tensor]:
    """Return a policy whose B is not zero, its batch, and the predictions of the bare model and of the reference."""
    patcher = patcher or build(case, dtype)
    recipe = load_recipe("toy", ["rank=4", "beta=5"])
    policy = NativePolicy(patcher, recipe)
    batch = Batch(case, patcher.model, dtype)
    noisy = policy.denoiser.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        policy._adapters.eject()
        bare = policy.denoiser.predict(noisy, batch.timesteps, batch.rows)
        policy._adapters.inject()
        with policy.reference():
            reference = policy.denoiser.predict(noisy, batch.timesteps, batch.rows)
    return policy, batch, bare, reference


def set_up_matrices(policy: NativePolicy, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.parameters.items():
        parameter.data = parameter.data.to(dtype)
        if name.endswith(".up"):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype) * 0.05


def check(name: str, folder: Path) -> dict:
    """Return what was found of a family."""
    case, found = CASES[name], {}
    policy, batch, bare, reference = open_policy(case, torch.float32)
    found["latents"] = "x".join(map(str, case.latents))
    found["sampling"] = "/".join(base.__name__ for base in type(policy.denoiser.sampling).__mro__[1:3])
    found["layers"] = len(policy.read_layers())
    found["reference_equals_model"] = bool(torch.equal(bare, reference))
    first = loss_of(policy, batch, reference)
    found["first_loss_minus_ln2"] = abs(float(first.detach()) - math.log(2))
    found["two_steps"] = two_steps(policy, batch, reference)
    found |= stock_loader(name, case, policy, batch, folder)
    policy.close()

    policy, batch, _, reference = open_policy(case, torch.float64)
    set_up_matrices(policy, torch.float64)
    ours = gradient(policy, loss_of(policy, batch, reference))
    with_grad = [
        (p.grad is not None and bool(p.grad.any())) for n, p in policy.parameters.items() if n.endswith("down")
    ]
    found["layers_with_gradient"] = sum(with_grad)
    policy.denoiser._blocks = []
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        truth = gradient(policy, loss_of(policy, batch, reference))
    found["gradient_error"] = float((ours - truth).norm() / truth.norm())
    direction = ours / ours.norm()
    # A step too long meets curvature (or another of HiDream's experts), one too short the float32 parts of a model.
    slopes = [slope(policy, batch, reference, direction, step) for step in (1e-3, 1e-4, 1e-5)]
    found["finite_difference_error"] = min(abs(value / float(ours.norm()) - 1) for value in slopes)
    policy.close()
    found["in_ram_gradient_error"] = in_ram(case)
    return found


def in_ram(case: Case) -> float:
    """Return how far gradients are off where the model stays in RAM, patched weights with it, as ComfyUI does it.

    Here RAM is where the rest is too: what is tried is that weights come anew in every pass, not the transfer.
    """
    patcher = build(case, torch.float32)
    paths = [path for path, _ in target_layers(patcher.model, "attention")]
    for path in (paths[0], paths[-1]):
        weight = patcher.model.get_submodule(path).weight
        change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4)) * 0.01
        patcher.add_patches({f"{path}.weight": ("diff", (change,))})
    policy, batch, _, reference = open_policy(case, torch.float32, patcher)
    set_up_matrices(policy, torch.float32)
    whole = gradient(policy, loss_of(policy, batch, reference))
    freed = policy._patcher.partially_unload(CPU, policy._patcher.model_size())
    assert freed and policy._patcher.model.lowvram_patch_counter
    parts = gradient(policy, loss_of(policy, batch, reference))
    policy.close()
    return float((parts - whole).norm() / whole.norm())


@torch.no_grad()
def slope(policy: NativePolicy, batch: Batch, reference: Tensor, direction: Tensor, step: float) -> float:
    losses = []
    for amount in (-step, step):
        with moved(policy, direction, amount):
            losses.append(float(loss_of(policy, batch, reference)))
    return (losses[1] - losses[0]) / (2 * step)


def two_steps(policy: NativePolicy, batch: Batch, reference: Tensor) -> list[float]:
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(policy, batch, reference)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    return losses


def stock_loader(name: str, case: Case, policy: NativePolicy, batch: Batch, folder: Path) -> dict:
    """Save what was trained, load it by core's own node and by ours, and compare predictions."""
    import nodes

    denoiser = policy.denoiser
    noisy = denoiser.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        bypass = denoiser.predict(noisy, batch.timesteps, batch.rows)
        with policy.reference():
            plain = denoiser.predict(noisy, batch.timesteps, batch.rows)
    layers = policy.read_layers()
    path = folder / f"{name}.safetensors"
    save_expert(Expert(layers, name=name), path)
    read = load_expert(path)
    check_loads(policy._patcher, read)  # as Train Safety Expert does after every training
    kept = read.layers.keys() == layers.keys()
    policy.close()

    def predict_with(file_name: str):
        (patched,) = nodes.LoraLoaderModelOnly().load_lora_model_only(policy._patcher, file_name, 1.0)
        again = NativePolicy(patched, load_recipe("toy", ["rank=4"]))  # B = 0: the patched model itself
        with torch.no_grad():
            predicted = again.denoiser.predict(noisy, batch.timesteps, batch.rows)
        again.close()
        return predicted, patched

    stock, patched = predict_with(path.name)
    change = (bypass - plain).norm()
    split = {}
    family = identity.family_name(case.config)
    if name in DIFFUSERS:
        # ComfyUI's own table of diffusers' names is the judge of the split.
        expert = Expert(layers, ExpertInfo(base_checkpoint=CheckpointId(family=family)), name)
        assert native_family(expert) == native_family(Expert(layers, name=name)) == family
        save_diffusers(expert, path.with_name(f"{name}_diffusers.safetensors"))
        as_diffusers, _ = predict_with(f"{name}_diffusers.safetensors")
        if name in ("sd3", "flux1"):
            split["mixed_experts_count_alike"] = calibration(family, layers, policy._patcher, noisy, batch)
        split["diffusers_file_error"] = float((as_diffusers - stock).norm() / change)
    return split | {
        "keys_loaded": len(patched.patches) - len(policy._patcher.patches),
        "own_reader_keeps_names": kept,
        "stock_loader_error": float((stock - bypass).norm() / change),
    }


def calibration(family: str, layers, patcher, noisy: Tensor, batch: Batch) -> bool:
    """Say whether Co-Merge counts the same of an expert in one piece beside one that was trained by checkpoint."""
    generator = torch.Generator().manual_seed(5)
    other = {
        name: replace(layer, up=torch.randn(layer.up.shape, generator=generator)) for name, layer in layers.items()
    }
    info = ExpertInfo(base_checkpoint=CheckpointId(family=family))
    whole = [Expert(layers, info, "one"), Expert(other, info, "other")]
    mixed = in_one_spelling([whole[0], with_split_layers(whole[1])])

    def counts_of(experts) -> dict[str, Tensor]:
        counter = ActivationCounter(experts)
        watched = watch(patcher, counter)
        comfy.model_management.load_models_gpu([watched], force_full_load=True)
        with torch.inference_mode():
            NativeDenoiser(watched, checkpoint_blocks=False).predict(noisy, batch.timesteps, batch.rows)
        comfy.model_management.unload_model_and_clones(watched)
        return counter.counts

    expected, found = counts_of(whole), counts_of(mixed)
    assert mixed[0].layers.keys() == found.keys() and any(counts.any() for counts in found.values())
    for name, counts in expected.items():
        parts = [kohya_name(path, TRANSFORMER_PREFIX) for path in split_layer(family, name, layers[name])]
        if not torch.equal(torch.cat([found[part] for part in parts], dim=1), counts):
            return False
    return True


class GGMLTensor(Tensor):
    """As in ComfyUI-GGUF's ops.py: packed bytes with the shape that they unpack to, never copied."""

    def __init__(self, *args, tensor_shape, **kwargs):
        super().__init__()
        self.tensor_shape = tensor_shape

    def __new__(cls, *args, tensor_shape, **kwargs):
        return super().__new__(cls, *args, **kwargs)

    def clone(self, *args, **kwargs):
        return self

    def detach(self, *args, **kwargs):
        return self

    def to(self, *args, **kwargs):
        new = super().to(*args, **kwargs)
        new.tensor_shape = self.tensor_shape
        return new

    @property
    def shape(self):
        return self.tensor_shape


class GGMLLinear(nn.Linear):
    """As GGMLOps.Linear: unpacks in every call; its state dict is an outline on the meta device."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.unpacked(), self.bias
        if isinstance(weight, GGMLTensor):
            weight = Tensor(weight)
        if isinstance(bias, GGMLTensor):
            bias = Tensor(bias.to(x.dtype))
        return nn.functional.linear(x, weight, bias)

    def unpacked(self) -> Tensor:
        return (self.weight.data.view(torch.uint8).float() - 128) / 1024

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = torch.empty(self.weight.shape, device="meta")


class GGUFModelPatcher(ModelPatcher):
    pass


def gguf_gradient_error(name: str = "flux1") -> float:
    """Return how far the gradient of a packed model is off that of the same numbers in float32.

    The packing is our own; ComfyUI-GGUF's is tried by benchmarks/gguf_models.py, which needs that pack.
    """
    plain, packed = (build(CASES[name], torch.float32) for _ in range(2))
    with torch.inference_mode():
        modules = packed.model.diffusion_model.named_modules()
        for path, layer in [(path, module) for path, module in modules if isinstance(module, nn.Linear)]:
            values = (layer.weight * 1024 + 128).round().clamp(0, 255).to(torch.uint8)
            layer.__class__ = GGMLLinear
            for name_of, value in (("weight", values), ("bias", layer.bias)):
                if value is not None:
                    own = GGMLTensor(value.data, tensor_shape=value.shape)
                    setattr(layer, name_of, nn.Parameter(own, requires_grad=False))
            plain.model.diffusion_model.get_submodule(path).weight.copy_(layer.unpacked().as_subclass(Tensor))
    packed.__class__ = GGUFModelPatcher
    first = identity.weights_sha256(packed)
    with torch.inference_mode():
        layer.weight.as_subclass(Tensor)[0] ^= 1
        del packed.model.safety_experts_sha256
        assert identity.weights_sha256(packed) != first  # the dataset names its packed weights
        layer.weight.as_subclass(Tensor)[0] ^= 1
    gradients = []
    for patcher in (packed, plain):
        policy, batch, _, reference = open_policy(CASES[name], torch.float32, patcher)
        set_up_matrices(policy, torch.float32)
        gradients.append(gradient(policy, loss_of(policy, batch, reference)))
        policy.close()
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def refusals() -> dict[str, str]:
    """Return what is said of models that cannot be trained on, by kind; empty where one is let through."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    class NunchakuLinear(nn.Linear):
        pass

    def spoil(patcher: ModelPatcher, kind: str) -> None:
        inner = patcher.model.diffusion_model
        if kind == "compiled":
            set_torch_compile_wrapper(patcher, backend="eager")
        elif kind == "nunchaku":
            inner.extra = NunchakuLinear(2, 2)
        else:
            inner.time_embed[0].weight._layout_cls = "TensorWiseINT8Layout"

    said = {}
    for kind in ("compiled", "nunchaku", "int8"):
        patcher = build(CASES["sd15"], torch.float32)
        spoil(patcher, kind)
        try:
            NativePolicy(patcher, load_recipe("toy")).close()
            said[kind] = ""
        except InputError as error:
            said[kind] = str(error)
    return said


def is_right(found: dict) -> bool:
    """Say whether everything is as it must be."""
    steps = found["two_steps"]
    return (
        found["reference_equals_model"]
        and found["first_loss_minus_ln2"] < 1e-6
        and steps[2] < steps[1] < steps[0]
        and found["keys_loaded"] == found["layers"]
        and found["own_reader_keeps_names"]
        and found["stock_loader_error"] < 1e-2
        and found.get("diffusers_file_error", 0.0) < 1e-2
        and found.get("mixed_experts_count_alike", True)
        and found["gradient_error"] < 1e-5
        and found["in_ram_gradient_error"] < 1e-5
        and found["finite_difference_error"] < 1e-3
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help="families, with commas between")
    parser.add_argument("--out", type=Path, help="write the results here, with machine, versions and date")
    parser.add_argument("--trace", action="store_true", help="show where a failure comes from")
    arguments = parser.parse_args(ARGUMENTS)
    results, folder = {}, Path(tempfile.mkdtemp())
    folder_paths.add_model_folder_path("loras", str(folder))
    for name in arguments.only.split(","):
        start = time.monotonic()
        try:
            found = check(name, folder)
            found["right"] = is_right(found)
        except Exception as error:
            if arguments.trace:
                traceback.print_exc()
            found = {"right": False, "error": f"{type(error).__name__}: {str(error)[:200]}"}
        results[name] = found
        print(f"{name:16} {time.monotonic() - start:5.1f} s  {json.dumps(found)}", flush=True)
    packed_error = gguf_gradient_error()
    refused = refusals()
    print(f"{'refusals':16}          {json.dumps(refused)}")
    if arguments.out:
        from comfyui_version import __version__ as comfyui_version

        report = {"comfyui": comfyui_version, **describe_machine(), "families": results}
        report |= {"gguf_gradient_error": packed_error, "refusals": refused}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    named = all(kind.lower() in text.lower() for kind, text in refused.items())
    return 0 if named and packed_error < 1e-5 and all(found["right"] for found in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
