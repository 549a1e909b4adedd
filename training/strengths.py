"""One strength for each of several experts, trained on preference pairs as an expert's weights are.

The model carries Σ_k c_k ΔW_k with the ΔW_k frozen; c is trained from 1 by the recipe's loss: the preference objective
and the SFT term raise it until unsafe prompts draw the chosen images, the anchor lowers it where safe prompts move.

Coefficients of a merge learned on data are AdaMerging's idea (arXiv 2310.02575); it minimises a classifier's entropy.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..devices import choose_device, compute_dtype
from ..errors import InputError
from ..experts.expert import Expert
from ..experts.keys import kohya_name
from ..experts.merging import merge_experts
from ..models.checkpoint import Checkpoint
from ..models.denoiser import Denoiser
from ..preferences.dataset import PreferenceDataset
from .batches import BatchPlan
from .lora import ADAPTER, lora_modules
from .policy import LoraPolicy
from .preparation import encode_dataset, load_policy
from .recipe import Recipe
from .run import TrainingRun


class _Strengths(nn.Module):
    """Scales each rank of an up matrix [out, r] by the strength of the expert it comes from."""

    def __init__(self, strengths: nn.Parameter, owners: Tensor):
        super().__init__()
        self.strengths, self.owners = strengths, owners

    def forward(self, up: Tensor) -> Tensor:
        return up * self.strengths[self.owners]


def fit_strengths(
    experts: Sequence[Expert],
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    recipe: Recipe,
    *,
    device: torch.device | str | None = None,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[float]:
    """Return one strength for each expert, in their order, for the weights of a sum.

    Args:
        experts: of the model's attention layers, as `train` makes them.
        dataset: pairs of all the experts' categories.
        recipe: loss, steps and learning rate; what concerns LoRA weights (rank, alpha) has no meaning here.
        device: default is the accelerator where there is one.
        on_step: called with (steps done, steps in all).
        should_stop: asked before every step; True returns the strengths so far.

    Raises:
        InputError: an expert has layers that are not trained here, or the dataset has no pairs.
    """
    target = choose_device(device)
    dtype = compute_dtype(target, recipe.precision)
    pairs = dataset.training_pairs(rule=recipe.pairs)
    cache = encode_dataset(dataset, pairs, checkpoint, recipe, target, dtype, lambda *_: None)
    denoiser = load_policy(checkpoint, recipe, (), target, dtype).denoiser
    return fit_on(experts, denoiser, BatchPlan(pairs, cache, recipe), recipe, target, on_step, should_stop)


def fit_on(
    experts: Sequence[Expert],
    denoiser: Denoiser,
    plan: BatchPlan,
    recipe: Recipe,
    device: torch.device,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[float]:
    """Do what `fit_strengths` does, with a loaded model that carries a LoRA and pairs that are encoded."""
    strengths = nn.Parameter(torch.ones(len(experts), device=device))
    _attach(denoiser.model, experts, strengths)
    policy = LoraPolicy(denoiser, recipe.lora_alpha, {"strengths": strengths})
    run = TrainingRun(policy, plan, recipe, device)
    while run.step < recipe.steps and run.take_step(should_stop or (lambda: False)) is not None:
        if on_step:
            on_step(run.step, recipe.steps)
    run.finish()
    return [round(value, 4) for value in strengths.tolist()]


def _attach(model: nn.Module, experts: Sequence[Expert], strengths: nn.Parameter) -> None:
    """Put the sum of the experts in place of the LoRA's weights, every rank scaled by its expert's strength."""
    total = merge_experts(experts, "linear")
    modules = {kohya_name(path): module for path, module in lora_modules(model)}
    if unknown := [name for name in total.layers if name not in modules]:
        raise InputError(
            f"{experts[0].name} and the others change layer {unknown[0]}, which is no attention layer of this model; "
            "merge with method linear and weights of your own"
        )
    for name, layer in total.layers.items():
        module = modules[name]
        owners = [index for index, expert in enumerate(experts) if name in expert.layers]
        ranks = torch.tensor([experts[index].layers[name].rank for index in owners])
        down, up = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        device = down.weight.device
        down.weight = nn.Parameter(layer.down.to(device), requires_grad=False)
        scale = layer.scale / module.scaling[ADAPTER]
        up.weight = nn.Parameter(layer.up.to(device) * scale, requires_grad=False)
        whose = torch.repeat_interleave(torch.tensor(owners), ranks).to(device)
        parametrize.register_parametrization(up, "weight", _Strengths(strengths, whose))
