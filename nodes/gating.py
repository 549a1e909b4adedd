"""LoRA layers that act only in a part of the sampling, or only on some of the conditionings.

Weights cannot be patched and unpatched at every step without slowing the host down, so the low-rank change is added to
each layer's output instead, while a wrapper around the model opens and closes the gates: by the current noise level,
and for each row of the batch by its conditioning.
"""

import itertools
from collections.abc import Mapping, Sequence

import comfy.utils
import torch
from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..experts.blocks import RankBlock, rank_blocks
from ..experts.concept_gate import Gate
from ..experts.expert import Expert, LoraLayer

GUARD_ROWS = "safety_experts_guard_rows"  # in the transformer options of a forward pass that a guard asked for
_numbers = itertools.count()


def transformer_options_of(arguments: Sequence, options: Mapping) -> dict:
    """Return the transformer options of what follows the conditioning in a call of ComfyUI's `apply_model`."""
    return options.get("transformer_options") or (arguments[1] if len(arguments) > 1 else None) or {}


class BatchGate:
    """Wraps the model: says whether the layers act now, and which rank blocks in which rows of the batch.

    Rows are judged by the cross-attention context they come with, so it does not matter how ComfyUI batches them.

    Args:
        first_sigma, last_sigma: open while the noise level is within, as ComfyUI's own timestep ranges count it.
        blocks: of the expert. One of several categories is open where any of them is; one of a category that the
            concept gate does not know always is.
        concepts: which conditionings each category is for; None: all.
    """

    def __init__(self, first_sigma: float, last_sigma: float, blocks: Sequence[RankBlock], concepts: Gate | None):
        self.first_sigma, self.last_sigma = first_sigma, last_sigma
        self.is_open = False
        self.rows: Tensor | None = None  # bool [b, blocks]; None: all
        self._concepts = concepts
        known = list(concepts.concepts) if concepts else []
        self._members = torch.tensor([[name in block.categories for name in known] for block in blocks])
        always = [not block.categories or not {*block.categories} <= {*known} for block in blocks]
        self._always = torch.tensor(always)

    def __call__(self, executor, x: Tensor, sigma: Tensor, c_concat=None, c_crossattn=None, *arguments, **options):
        self.is_open = self.last_sigma <= float(sigma.max()) <= self.first_sigma
        if GUARD_ROWS in transformer_options_of(arguments, options):
            self.is_open = False  # a guard asks what the model draws without experts
        self.rows = None
        if self.is_open and self._concepts:
            rows = self._open_blocks(c_crossattn).cpu()
            self.is_open = bool(rows.any())
            self.rows = None if rows.all() else rows.to(x.device)
        return executor(x, sigma, c_concat, c_crossattn, *arguments, **options)

    def _open_blocks(self, context: Tensor | None) -> Tensor:
        assert self._concepts
        if context is None or self._concepts.width not in (None, context.shape[2]):
            found = "no" if context is None else f"{context.shape[2]} wide"
            raise InputError(
                f"the concept gate is for {self._concepts.width} wide conditionings and this model gets {found} ones; "
                "make the gate with this model's text encoder"
            )
        opened = self._concepts.opened(context)  # [b, categories]
        return (opened[:, None] & self._members.to(opened.device)).any(dim=2) | self._always.to(opened.device)


class GatedLayer:
    """A forward hook that adds a LoRA layer's contribution to a module's output where the gate is open.

    Args:
        block_of_rank: the rank block that each rank of the layer belongs to, int [r].
    """

    def __init__(self, layer: LoraLayer, block_of_rank: Tensor, gate: BatchGate):
        self._down, self._up, self._gate = layer.down, layer.up.float() * layer.scale, gate
        self._block_of_rank = block_of_rank

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._gate.is_open:
            return output
        x = inputs[0]
        self._down, self._up = self._down.to(x), self._up.to(x)  # stays there for the next step
        if isinstance(module, nn.Conv2d):
            hidden = functional.conv2d(x, self._down, None, module.stride, module.padding, module.dilation)
            return output + functional.conv2d(self._where_open(hidden, 1), self._up)
        return output + functional.linear(self._where_open(functional.linear(x, self._down), -1), self._up)

    def _where_open(self, hidden: Tensor, rank_dim: int) -> Tensor:
        """Return hidden [b, …, r, …] with zeros in the ranks of closed blocks."""
        if self._gate.rows is None:
            return hidden
        self._block_of_rank = self._block_of_rank.to(hidden.device)
        ranks = self._gate.rows[:, self._block_of_rank]  # [b, r]
        # Some attention patches cut a row into tiles, which follow one another in the batch.
        ranks = ranks.repeat_interleave(hidden.shape[0] // ranks.shape[0], dim=0)
        shape = [1] * hidden.ndim
        shape[0], shape[rank_dim] = ranks.shape
        return hidden * ranks.reshape(shape)


def add_gated_layers(
    model,
    keys: Mapping[str, object],
    expert: Expert,
    start_percent: float,
    end_percent: float,
    concepts: Gate | None = None,
):
    """Return a clone of a ModelPatcher with LoRA layers that act between two points of the sampling.

    Any number of these stack, and they compose with weight patches, hooks and batched conditions.

    Args:
        keys: layer name -> ComfyUI weight key, for all of the expert's; layers of the text encoder are left out.
        start_percent, end_percent: 0 is the beginning of the sampling, 1 its end.
        concepts: which conditionings each category acts on; None: all.

    Raises:
        InputError: a layer changes a slice of a fused weight.
    """
    sampling = model.get_model_object("model_sampling")
    blocks = rank_blocks(expert)
    gate = BatchGate(sampling.percent_to_sigma(start_percent), sampling.percent_to_sigma(end_percent), blocks, concepts)
    hooks: dict[str, GatedLayer] = {}
    for name, layer in expert.layers.items():
        key = keys[name]
        if not isinstance(key, str):
            raise InputError("a gate and a part of the sampling do not work on this model family: leave them out")
        if key.startswith("diffusion_model."):
            sizes = torch.tensor([block.ranks.get(name, 0) for block in blocks])
            block_of_rank = torch.arange(len(blocks)).repeat_interleave(sizes)
            hooks[key.removesuffix(".weight")] = GatedLayer(layer, block_of_rank, gate)
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def inject(patcher) -> None:
        for path, hook in hooks.items():
            handles.append(comfy.utils.get_attr(patcher.model, path).register_forward_hook(hook))

    def eject(patcher) -> None:
        while handles:
            handles.pop().remove()

    own_key = f"safety_experts_gate_{next(_numbers)}"  # under one fixed key a second expert would replace the first
    gated = model.clone()
    gated.set_injections(own_key, [PatcherInjection(inject=inject, eject=eject)])
    gated.add_wrapper_with_key(WrappersMP.APPLY_MODEL, own_key, gate)
    return gated
