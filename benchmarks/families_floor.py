"""What a native training step computes and keeps for families in their real sizes, counted on fake tensors.

    COMFYUI_PATH=<ComfyUI> python benchmarks/families_floor.py [--only flux1-dev,z-image]

No GPU and no weights are needed: ComfyUI's own classes in their published configurations, weights in bfloat16, an
attention LoRA of rank 4 in float32, one pair (two rows) of 1024 px under 256 tokens, every block checkpointed.

Counted: every matrix product and attention of the reference's pass, of the policy's pass and of its way back (with the
second forward pass of checkpointed blocks); every tensor while it lives: weights, LoRA, gradients, activations.
Not counted: the optimizer (8 bytes a LoRA weight), the CUDA context, workspaces, fragmentation, and the text encoder
and VAE, which are unloaded by then. Of HiDream's experts each gets as many tokens as the others. Exit 1 if a family
could not be counted.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import family_cases as tiny  # first: it sets ComfyUI up
import torch
from comfy.ldm.hidream.model import MOEFeedForwardSwiGLU
from comfy.model_patcher import ModelPatcher
from family_cases import ARGUMENTS, CASES, Case
from safety_experts.evaluation.machine import describe_machine
from safety_experts.nodes.native.adapters import Adapters
from safety_experts.nodes.native.denoiser import NativeDenoiser
from safety_experts.nodes.native.room import room_bytes
from safety_experts.training.recipe import load_recipe
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from training_floor import LiveMemory, pretend

RESULT = Path(__file__).resolve().parent / "results" / "families_floor.json"
# torch's own tells saved tensors apart by their addresses, and fake ones have none. Here what a block overwrites is not
# copied first: in FLUX's blocks that would be one more activation at a time.
torch.autograd.graph.allow_mutation_on_saved_tensors = lambda: torch.autograd.graph.saved_tensors_hooks(
    lambda tensor: [tensor], lambda box: box[0]
)
TOKENS, ROWS = 256, 2
FLUX1 = tiny.FLUX1 | {
    "hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
    "context_in_dim": 4096, "vec_in_dim": 768,
}  # fmt: skip
FLUX2 = tiny.FLUX2 | {"in_channels": 128, "out_channels": 128, "axes_dim": [32, 32, 32, 32]}
SD3 = tiny.SD3 | {
    "adm_in_channels": 2048, "num_patches": 36864, "pos_embed_max_size": 192,
}  # fmt: skip
LUMINA = tiny.LUMINA2 | {"n_refiner_layers": 2}
WAN = tiny.WAN | {"freq_dim": 256, "text_dim": 4096}


def sd3(depth: int, self_attention: int) -> dict:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64 * depth}}
    return SD3 | {
        "depth": depth,
        "context_embedder_config": embedder,
        "x_block_self_attn_layers": list(range(self_attention)),
    }


def real(name: str, unet: dict, text_dim: int, latents: tuple[int, ...], pooled: int = 0) -> Case:
    """Return a family's tiny case (benchmarks/family_cases.py) in a real size."""
    case = CASES[name]
    extra = {"pooled_output": lambda tokens: torch.zeros(pooled)} if pooled else {}
    return Case(case.config, case.base, unet, latents, text_dim, extra)


def hidream() -> Case:
    """Every block has a Llama layer of its own, from the last on the last one (ComfyUI's model_detection.py)."""
    unet = tiny.HIDREAM | {
        "num_layers": 16, "num_single_layers": 32, "attention_head_dim": 128, "num_attention_heads": 20,
        "caption_channels": [4096, 4096], "text_emb_dim": 2048, "axes_dims_rope": (64, 32, 32),
        "llama_layers": [min(block, 31) for block in range(48)],
    }  # fmt: skip
    case = real("hidream-i1", unet, 4096, IMAGE16, 2048)
    case.extra["conditioning_llama3"] = lambda tokens: torch.zeros(32, tokens, 4096)
    return case


def shared_evenly(self, x: torch.Tensor) -> torch.Tensor:
    """HiDream's mixture of experts with as many tokens for each: which ones it would choose, fake tensors cannot say.

    The products of matrices are as many however the tokens are shared.
    """
    weights = self.gate(x)[1]
    rows = x.view(-1, x.shape[-1]).repeat_interleave(self.num_activated_experts, dim=0)
    given = torch.empty_like(rows)
    for expert, places in zip(self.experts, torch.arange(len(rows)).chunk(len(self.experts)), strict=True):
        given[places] = expert(rows[places])
    mixed = (given.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
    return mixed.view(x.shape) + self.shared_experts(x)


MOEFeedForwardSwiGLU.forward = shared_evenly
IMAGE4, IMAGE16, IMAGE128, FRAME16 = (4, 128, 128), (16, 128, 128), (128, 64, 64), (16, 1, 128, 128)
# Published sizes: ComfyUI's model_detection.py where it has them, else diffusers' configs of the same models.
REAL: dict[str, Case] = {
    "sd3.5-medium": real("sd3", sd3(24, 13), 4096, IMAGE16, 2048),
    "sd3.5-large": real("sd3", sd3(38, 0), 4096, IMAGE16, 2048),
    "flux1-dev": real("flux1", FLUX1, 4096, IMAGE16, 768),
    "chroma": real(
        "chroma",
        {**{name: value for name, value in FLUX1.items() if name != "guidance_embed"}, "image_model": "chroma",
         "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5},
        4096, IMAGE16,
    ),
    "flux2-klein-4b": real(
        "flux2-klein",
        FLUX2 | {"hidden_size": 3072, "num_heads": 24, "depth": 5, "depth_single_blocks": 20, "context_in_dim": 7680},
        7680, IMAGE128,
    ),
    "flux2-dev": real(
        "flux2-klein",
        FLUX2 | {"hidden_size": 6144, "num_heads": 48, "depth": 8, "depth_single_blocks": 48, "context_in_dim": 15360,
                 "guidance_embed": True},
        15360, IMAGE128,
    ),
    "z-image": real(
        "z-image",
        LUMINA | {"dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560,
                  "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
                  "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True, "time_scale": 1000.0,
                  "pad_tokens_multiple": 32},
        2560, IMAGE16,
    ),
    "lumina2": real(
        "lumina2",
        LUMINA | {"dim": 2304, "n_layers": 26, "n_heads": 24, "n_kv_heads": 8, "cap_feat_dim": 2304,
                  "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512], "ffn_dim_multiplier": 4.0},
        2304, IMAGE16,
    ),
    "qwen-image": real("qwen-image", {"image_model": "qwen_image", "num_layers": 60}, 3584, FRAME16),
    "wan2.1-1.3b": real(
        "wan2.2", WAN | {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}, 4096, FRAME16
    ),
    "wan2.2-14b": real(
        "wan2.2", WAN | {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}, 4096, FRAME16
    ),
    "hidream-i1": hidream(),
    "krea2": real("krea2", {"image_model": "krea2", "features": 6144, "heads": 48, "kvheads": 12, "layers": 28,
                            "txtdim": 2560, "txtlayers": 12}, 12 * 2560, FRAME16),
    "auraflow": real(
        "auraflow",
        tiny.AURAFLOW | {"dim": 3072, "n_layers": 36, "n_double_layers": 4, "n_heads": 12, "global_conddim": 3072,
                             "cond_seq_dim": 2048, "max_seq": 4096},
        2048, IMAGE4,
    ),
    "cosmos-predict2-2b": real(
        "cosmos-predict2",
        tiny.COSMOS | {"model_channels": 2048, "num_blocks": 28, "num_heads": 16, "crossattn_emb_channels": 1024,
                           "adaln_lora_dim": 256},
        1024, FRAME16,
    ),
    "ernie-image": real("ernie-image", {"image_model": "ernie"}, 3072, IMAGE128),
}  # fmt: skip


def count(case: Case) -> dict[str, float]:
    """Return what a step of one pair computes and keeps."""
    config = case.config({**case.unet, "dtype": torch.bfloat16})
    config.set_inference_dtype(torch.bfloat16, None)
    model = case.base(config, device=torch.device("meta")).eval().requires_grad_(False)
    flops: list[int] = []
    for counter in (FlopCounterMode(display=False), None):  # apart: the counter keeps checkpointed tensors alive
        with FakeTensorMode(allow_non_fake_inputs=True):
            pretend([model])
            memory = LiveMemory()
            for weight in model.parameters():
                memory.track(weight)
            weights = memory.live
            adapters = Adapters(model, load_recipe("z-image", ["rank=4"]), torch.device("cpu"))
            for adapter in adapters.by_name.values():
                adapter.to = lambda *_, own=adapter, **__: (
                    own
                )  # it is where it must be, and fake tensors cannot be exchanged
            patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
            room = room_bytes(patcher, adapters, ROWS)
            adapters.inject()
            denoiser = NativeDenoiser(patcher, True)
            noisy = torch.zeros(ROWS, *case.latents)
            row = {"cross_attn": torch.zeros(TOKENS, case.text_dim, dtype=torch.bfloat16)}
            row |= {name: make(TOKENS).to(torch.bfloat16) for name, make in case.extra.items()}
            rows = {name: [value] * ROWS for name, value in row.items()}
            timesteps = torch.full((ROWS,), 500)
            try:
                with memory if counter is None else counter:
                    with torch.no_grad():
                        adapters.set_multiplier(0.0)
                        denoiser.predict(noisy, timesteps, rows)
                        adapters.set_multiplier(1.0)
                    denoiser.predict(noisy, timesteps, rows).sum().backward()
            finally:
                adapters.eject()
            trained = sum(parameter.numel() for parameter in adapters.parameters().values())
            if counter:
                flops.append(counter.get_total_flops())
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters_billion": round(total / 1e9, 2),
        "lora_million": round(trained / 1e6, 2),
        "teraflop_per_pair": round(flops[0] / 1e12, 1),
        "weights_gb": round(weights / 1e9, 2),
        "peak_memory_gb": round(memory.peak / 1e9, 2),
        "beside_the_weights_gb": round((memory.peak - weights) / 1e9, 2),
        "room_left_free_gb": round(room / 1e9, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default=",".join(REAL), help="families, with commas between; the others keep their numbers"
    )
    arguments = parser.parse_args(ARGUMENTS)
    found: dict[str, dict] = {}
    for name in arguments.only.split(","):
        start = time.monotonic()
        try:
            found[name] = count(REAL[name])
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"{name:20} {time.monotonic() - start:5.1f} s  {json.dumps(found[name])}", flush=True)
        write(found)
    return int(any("error" in row for row in found.values()))


def write(found: dict[str, dict]) -> None:
    """Put what was counted into the result, beside what was counted before."""
    from comfyui_version import __version__ as comfyui_version

    before = json.loads(RESULT.read_text(encoding="utf-8"))["families"] if RESULT.exists() else {}
    result = {
        "what": __doc__.splitlines()[0],
        "notes": " ".join(__doc__.split("\n\n")[3].split()),
        "families": {name: (before | found)[name] for name in REAL if name in before | found},
        "comfyui": comfyui_version,
        **describe_machine(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
