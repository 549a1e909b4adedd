"""Train every family of models that ComfyUI can load, as a tiny random model on a CPU, through the native path.

    COMFYUI_PATH=<ComfyUI> python benchmarks/families.py [--only sd15,flux1] [--out benchmarks/results/families.json]

For each: the reference is bit for bit the model without adapters; the gradient of the DPO loss is that of float64
finite differences and of plain autograd on saved copies; two steps lower the loss on fixed noise; the saved file loads
in stock LoraLoaderModelOnly with every key and gives what the adapters gave. Exit 1 if one is not so.
"""

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = os.environ.get("COMFYUI_PATH")
if not ROOT:
    raise SystemExit("set COMFYUI_PATH to a ComfyUI folder")
sys.path.insert(0, ROOT)
ARGUMENTS, sys.argv = sys.argv[1:], ["main.py", "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402

logging.disable(logging.WARNING)
import comfy.model_base as bases  # noqa: E402
import comfy.supported_models as supported  # noqa: E402
import folder_paths  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402
from safety_experts.checkpoint_id import CheckpointId  # noqa: E402
from safety_experts.errors import InputError  # noqa: E402
from safety_experts.evaluation.machine import describe_machine  # noqa: E402
from safety_experts.experts.expert import Expert  # noqa: E402
from safety_experts.experts.expert_file import load_expert, save_diffusers, save_expert  # noqa: E402
from safety_experts.experts.fused import native_family  # noqa: E402
from safety_experts.experts.info import ExpertInfo  # noqa: E402
from safety_experts.nodes.native import identity  # noqa: E402
from safety_experts.nodes.native.policy import NativePolicy  # noqa: E402
from safety_experts.nodes.native.verification import check_loads  # noqa: E402
from safety_experts.training.recipe import load_recipe  # noqa: E402
from torch import Tensor, nn  # noqa: E402

CPU = torch.device("cpu")
# Families whose diffusers' names stock ComfyUI reads too; its own tables for the others are missing or of other sizes.
DIFFUSERS = ("sd3", "flux1", "flux2-klein", "z-image", "qwen-image")
BETA, TOKENS = 5.0, (7, 7, 5)  # of chosen and rejected, and of the prompt of a second pair


@dataclass
class Case:
    """A tiny model: ComfyUI's config and base class, its UNet config, the latents' shape, the text's width."""

    config: type
    base: type
    unet: dict
    latents: tuple[int, ...]
    text_dim: int = 32
    extra: dict = field(default_factory=dict)
    """Other tensors of a condition, [...] without batch; a callable of the number of tokens where they go with it."""


def pooled(width: int = 32) -> dict:
    return {"pooled_output": lambda tokens: torch.randn(width)}


SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "num_heads": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "num_head_channels": -1,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
SDXL = SD15 | {
    "use_linear_in_transformer": True,
    "adm_in_channels": 32 + 6 * 256,
    "num_classes": "sequential",
    "num_heads": -1,
    "num_head_channels": 32,
    "transformer_depth": [0, 2],
    "transformer_depth_output": [0, 0, 2, 2],
    "transformer_depth_middle": 2,
}
SD3 = {
    "in_channels": 16,
    "depth": 2,
    "patch_size": 2,
    "out_channels": 16,
    "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 128}},
    "num_patches": 64 * 64,
    "pos_embed_max_size": 64,
    "pos_embed_scaling_factor": None,
    "x_block_self_attn_layers": [],
    "qkv_bias": True,
    "input_size": None,
    "qk_norm": "rms",
}
FLUX1 = {
    "image_model": "flux",
    "in_channels": 16,
    "patch_size": 2,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX2 = FLUX1 | {
    "image_model": "flux2",
    "patch_size": 1,
    "vec_in_dim": None,
    "mlp_ratio": 3.0,
    "axes_dim": [8, 8, 8, 8],
    "theta": 2000,
    "qkv_bias": False,
    "guidance_embed": False,
    "txt_ids_dims": [3],
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
CHROMA = {name: value for name, value in FLUX1.items() if name != "guidance_embed"} | {
    "image_model": "chroma",
    "in_channels": 64,
    "out_channels": 64,
    "in_dim": 64,
    "out_dim": 128,
    "hidden_dim": 128,
    "n_layers": 1,
}
LUMINA2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 128,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64],
    "qk_norm": True,
    "rope_theta": 10000.0,
}
Z_IMAGE = LUMINA2 | {
    "dim": 256,
    "n_heads": 8,
    "n_kv_heads": 8,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
    "ffn_dim_multiplier": 2.0,
    "norm_eps": 1e-5,
    "rope_theta": 256.0,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 12, 12),
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "in_dim": 16,
    "out_dim": 16,
    "dim": 128,
    "ffn_dim": 256,
    "freq_dim": 32,
    "text_dim": 32,
    "num_heads": 4,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
    "text_len": 512,
}
HIDREAM = {
    "image_model": "hidream",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "caption_channels": [32, 32],
    "text_emb_dim": 32,
    "num_routed_experts": 4,
    "num_activated_experts": 2,
    "axes_dims_rope": (8, 12, 12),
    "max_resolution": [128, 128],
    "llama_layers": [0, 1],
}
COSMOS = {
    "image_model": "cosmos_predict2",
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 128,
    "num_blocks": 2,
    "num_heads": 4,
    "crossattn_emb_channels": 32,
    "concat_padding_mask": True,
    "pos_emb_cls": "rope3d",
    "pos_emb_learnable": False,
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
    "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0,
    "rope_t_extrapolation_ratio": 1.0,
    "extra_per_block_abs_pos_emb": False,
    "rope_enable_fps_modulation": False,
}
KREA2 = {
    "image_model": "krea2",
    "features": 128,
    "tdim": 32,
    "txtdim": 32,
    "heads": 4,
    "kvheads": 2,
    "multiplier": 4,
    "layers": 2,
    "patch": 2,
    "channels": 16,
    "txtlayers": 1,
    "txtheads": 4,
    "txtkvheads": 4,
}
ERNIE = {
    "image_model": "ernie",
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_layers": 2,
    "ffn_hidden_size": 256,
    "in_channels": 16,
    "out_channels": 16,
    "text_in_dim": 32,
    "rope_axes_dim": (8, 12, 12),
}
AURAFLOW = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "dim": 128,
    "n_layers": 2,
    "n_double_layers": 1,
    "n_heads": 4,
    "global_conddim": 128,
    "cond_seq_dim": 32,
    "max_seq": 1024,
}
IMAGE4, IMAGE16, FRAME16 = (4, 16, 16), (16, 16, 16), (16, 1, 16, 16)
HIDREAM_TEXT = pooled() | {"conditioning_llama3": lambda tokens: torch.randn(2, tokens, 32)}
CASES: dict[str, Case] = {
    "sd15": Case(supported.SD15, bases.BaseModel, SD15, IMAGE4),
    "sdxl": Case(supported.SDXL, bases.SDXL, SDXL, IMAGE4, extra=pooled()),
    "sd3": Case(supported.SD3, bases.SD3, SD3, IMAGE16, extra=pooled()),
    "flux1": Case(supported.Flux, bases.Flux, FLUX1, IMAGE16, extra=pooled()),
    "flux2-klein": Case(supported.Flux2, bases.Flux2, FLUX2, IMAGE16),
    "chroma": Case(supported.Chroma, bases.Chroma, CHROMA, IMAGE16),
    "z-image": Case(supported.ZImage, bases.Lumina2, Z_IMAGE, IMAGE16),
    "lumina2": Case(supported.Lumina2, bases.Lumina2, LUMINA2, IMAGE16),
    "qwen-image": Case(supported.QwenImage, bases.QwenImage, QWEN, FRAME16),
    "wan2.2": Case(supported.WAN21_T2V, bases.WAN21, WAN, FRAME16),
    "hidream-i1": Case(supported.HiDream, bases.HiDream, HIDREAM, IMAGE16, extra=HIDREAM_TEXT),
    "krea2": Case(supported.Krea2, bases.Krea2, KREA2, FRAME16),
    "auraflow": Case(supported.AuraFlow, bases.AuraFlow, AURAFLOW, IMAGE4),
    "cosmos-predict2": Case(supported.CosmosT2IPredict2, bases.CosmosPredict2, COSMOS, FRAME16),
    "ernie-image": Case(supported.ErnieImage, bases.ErnieImage, ERNIE, IMAGE16),
    "mage-flow": Case(
        supported.MageFlow, bases.MageFlow, QWEN | {"image_model": "mage_flow", "in_channels": 16}, IMAGE16
    ),
}


def build(case: Case, dtype: torch.dtype) -> ModelPatcher:
    """Return the tiny model with random weights, as a loader in a graph leaves it: made in inference mode."""
    torch.manual_seed(0)
    config = case.config({**case.unet, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    model = case.base(config, device="cpu")
    with torch.inference_mode():
        for name, value in model.diffusion_model.named_parameters():
            if value.ndim >= 2:
                value.normal_(0, 1 / math.sqrt(max(1, value[0].numel())))
            else:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, value in model.diffusion_model.named_buffers():
            if value.is_floating_point() and "pos_embed" in name:
                value.normal_(0, 0.1)
    model.eval()
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


def open_policy(case: Case, dtype: torch.dtype) -> tuple[NativePolicy, Batch, Tensor, Tensor]:
    """Return a policy whose B is not zero, its batch, and the predictions of the bare model and of the reference."""
    patcher = build(case, dtype)
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
    return found


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
        split["diffusers_file_error"] = float((as_diffusers - stock).norm() / change)
    return split | {
        "keys_loaded": len(patched.patches) - len(policy._patcher.patches),
        "own_reader_keeps_names": kept,
        "stock_loader_error": float((stock - bypass).norm() / change),
    }


def refusals() -> dict[str, str]:
    """Return what is said of models that cannot be trained on, by kind; empty where one is let through."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    class NunchakuLinear(nn.Linear):
        pass

    class GGMLTensor(Tensor):
        """As in ComfyUI-GGUF's ops.py: packed bytes with the shape they unpack to, never copied."""

        tensor_shape = torch.Size((256, 64))

        @property
        def shape(self):
            return self.tensor_shape

        def clone(self, *args, **kwargs):
            return self

        def detach(self, *args, **kwargs):
            return self

    class GGMLLinear(nn.Module):
        """As GGMLOps.Linear: its state dict is an outline on the meta device."""

        def __init__(self, packed: Tensor):
            super().__init__()
            self.in_features, self.out_features, self.bias = 64, 256, None
            self.weight = nn.Parameter(packed.as_subclass(GGMLTensor), requires_grad=False)

        def _save_to_state_dict(self, destination, prefix, keep_vars):
            destination[f"{prefix}weight"] = torch.empty(256, 64, device="meta")
            destination[f"{prefix}temp.weight"] = torch.empty(256, 64, device="meta")

    class GGUFModelPatcher(ModelPatcher):
        pass

    def spoil(patcher: ModelPatcher, kind: str) -> None:
        inner = patcher.model.diffusion_model
        if kind == "compiled":
            set_torch_compile_wrapper(patcher, backend="eager")
        elif kind == "nunchaku":
            inner.extra = NunchakuLinear(2, 2)
        elif kind == "GGUF":
            inner.time_embed[0] = GGMLLinear(torch.arange(9216).to(torch.uint8))
            first = identity.weights_sha256(patcher)
            del patcher.model.safety_experts_sha256
            inner.time_embed[0].weight.as_subclass(Tensor)[0] += 1
            assert identity.weights_sha256(patcher) != first  # such a MODEL can draw, and the dataset names its weights
            patcher.__class__ = GGUFModelPatcher
        else:
            inner.time_embed[0].weight._layout_cls = "TensorWiseINT8Layout"

    said = {}
    for kind in ("compiled", "nunchaku", "GGUF", "int8"):
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
        and found["gradient_error"] < 1e-5
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
    refused = refusals()
    print(f"{'refusals':16}          {json.dumps(refused)}")
    if arguments.out:
        from comfyui_version import __version__ as comfyui_version

        report = {"comfyui": comfyui_version, **describe_machine(), "families": results, "refusals": refused}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    named = all(kind.lower() in text.lower() for kind, text in refused.items())
    return 0 if named and all(found["right"] for found in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
