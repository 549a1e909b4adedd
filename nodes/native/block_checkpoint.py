"""Gradient checkpointing that gives exact gradients for every model, whatever its blocks do to their inputs.

FLUX and its kin add into their inputs in place. Autograd raises then, and core's own checkpointing gives wrong
gradients without a word (docs/comfyui_flux_gradients.md): its second run starts from what the first one left behind.
Here both runs work on copies.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from torch import Tensor, nn

Mode = Callable[[], contextlib.AbstractContextManager]


def can_do_without(model: nn.Module) -> bool:
    """Say whether a diffusion model changes nothing in place, so that plain autograd is right too."""
    return isinstance(model, UNetModel)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks to checkpoint: the outermost lists' members, or a UNet's residual and transformer blocks."""
    if isinstance(model, UNetModel):
        return [module for module in model.modules() if isinstance(module, ResBlock | SpatialTransformer)]
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            blocks += [block for block in child if any(True for _ in block.parameters())]
        else:
            blocks += blocks_of(child)
    return blocks


@contextlib.contextmanager
def checkpointed(blocks: Sequence[nn.Module], mode: Mode, *, copies_all: bool = False) -> Iterator[None]:
    """Inside, each block's forward keeps its inputs alone and runs again in the backward pass, then inside `mode`.

    With `copies_all` all that autograd saves is a copy, not only what is written over: GGUF's tensors come out of the
    mode that watches for that as their own class, and their layers fail.
    """
    mode = _joined(mode, _copying if copies_all else torch.autograd.graph.allow_mutation_on_saved_tensors)
    originals = [block.forward for block in blocks]
    for block, original in zip(blocks, originals, strict=True):
        block.forward = _checkpointing(original, mode)
    try:
        yield
    finally:
        for block, original in zip(blocks, originals, strict=True):
            if getattr(original, "__self__", None) is block:
                del block.forward  # the class's own again
            else:
                block.forward = original


def _joined(*modes: Mode) -> Mode:
    @contextlib.contextmanager
    def inside() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode())
            yield

    return inside


def _copying() -> contextlib.AbstractContextManager:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda copy: copy)


def _checkpointing(forward: Callable, mode: Mode) -> Callable:
    def run(*args, **kwargs):
        places: list[tuple[str, Any]] = [("args", i) for i, value in enumerate(args) if _is_float(value)]
        places += [("kwargs", name) for name, value in kwargs.items() if _is_float(value)]
        given: dict[str, Any] = {"args": args, "kwargs": kwargs}
        tensors = [given[kind][place] for kind, place in places]
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            return forward(*args, **kwargs)

        def again(values: Sequence[Tensor]):
            new: dict[str, Any] = {"args": list(args), "kwargs": dict(kwargs)}
            for (kind, place), value in zip(places, values, strict=True):
                new[kind][place] = value
            return forward(*new["args"], **new["kwargs"])

        out = _Block.apply(again, mode, *tensors)
        # What follows may write into the outputs, which autograd forbids for a function's own.
        if isinstance(out, tuple):
            return tuple(value.clone() if isinstance(value, Tensor) else value for value in out)
        return out.clone()

    return run


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, again, mode, *tensors):
        ctx.again, ctx.mode = again, mode
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return again([tensor.clone() for tensor in tensors])

    @staticmethod
    def backward(ctx, *gradients):
        inputs = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        with ctx.mode(), torch.enable_grad():
            out = ctx.again([tensor.clone() for tensor in inputs])
            outs = out if isinstance(out, tuple) else (out,)
            reached = [
                (value, gradient)
                for value, gradient in zip(outs, gradients, strict=True)
                if isinstance(value, Tensor) and value.requires_grad and gradient is not None
            ]
            torch.autograd.backward([value for value, _ in reached], [gradient for _, gradient in reached])
        return (None, None, *(tensor.grad for tensor in inputs))
