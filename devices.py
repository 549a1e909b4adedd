"""Where to compute and in what precision: one rule for training, calibration, merging and the commands."""

import torch

from .errors import InputError


def choose_device(given: torch.device | str | None = None) -> torch.device:
    """Return the device that was asked for, else the accelerator (CUDA, XPU, MPS, …), else the CPU."""
    if given is not None:
        return _named_device(given)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _named_device(given: torch.device | str) -> torch.device:
    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such type, none of it here, or too few
        raise InputError(f"no device {str(given)[:40]!r} on this machine; leave it out, or use cpu or cuda") from error
    if device.type == "meta":
        raise InputError("the device meta computes nothing; leave it out, or use cpu or cuda")
    return device


def compute_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Return what a model computes in: the precision asked for (fp32, bf16, fp16), or what the device is fast at."""
    if precision != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        # Without these instructions bfloat16 is emulated on a CPU and slower than float32.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than torch 2.6
        is_kept_off = torch.backends.cpu.get_cpu_capability() == "AVX2"  # by ATEN_CPU_CAPABILITY; 20 to 40 times slower
        has_bfloat16 = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        return torch.bfloat16 if has_bfloat16 and not is_kept_off else torch.float32
    return torch.float32


def encoding_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return what VAE and text encoders compute in, where the model computes in `dtype`.

    A CPU encodes in float32: encoding is done once, and bfloat16 would cost accuracy for little time.
    """
    return torch.float32 if device.type == "cpu" else dtype
