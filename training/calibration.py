"""Co-Merge's calibration outside the graph: the base UNet runs on a dataset's unsafe prompts, experts are compared."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..devices import choose_device, compute_dtype, encoding_dtype
from ..errors import InputError
from ..experts.co_merge import ActivationCounter
from ..experts.expert import Expert
from ..models.checkpoint import Checkpoint
from ..models.denoiser import Denoiser, conditions_on
from ..models.noise_schedule import NUM_TIMESTEPS
from ..preferences.dataset import PreferenceDataset, PreferencePair
from ..seeding import seeded_generator
from .cache import PairCache

_PAIRS_PER_PASS = 8


def collect_activation_counts(
    experts: Sequence[Expert],
    checkpoint: Checkpoint,
    dataset: PreferenceDataset,
    *,
    num_prompts: int = 64,
    seed: int = 0,
    device: torch.device | str | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Count, over a dataset, which expert is the most active in each output row of the base model.

    Each drawn pair gives its rejected image, noised to a uniformly random timestep, under its unsafe prompt: states the
    base model passes through when it draws what the experts are against.

    Args:
        experts: their order is the order of the counts.
        checkpoint: the base model, without any expert.
        dataset: a preference dataset of all categories; pairs are drawn from it without repetition.
        num_prompts: pairs at most.
        seed: of the choice of pairs, the noise and the timesteps.
        device: default is the accelerator where there is one.
        on_step: called with (pairs done, pairs in all).

    Returns:
        layer -> [K, out] int64 counts, for `merge_experts(..., activation_counts=...)`.

    Raises:
        InputError: dataset or checkpoint are unusable, or hold no layer of the experts.
    """
    target = choose_device(device)
    dtype = compute_dtype(target)
    pairs = dataset.training_pairs()
    if not pairs or num_prompts < 1:
        raise InputError(
            f"no pairs to calibrate on in {dataset.folder} (it has {len(pairs)}, {num_prompts} are wanted)"
        )
    order = torch.randperm(len(pairs), generator=seeded_generator(seed, "calibration"))[:num_prompts]
    pairs = [pairs[index] for index in order.tolist()]
    with torch.inference_mode():
        cache = PairCache(dataset, checkpoint, target, encoding_dtype(target, dtype))
        cache.encode_pairs(pairs, flips=False, on_progress=lambda done, total: None)
        cache.encode_prompts([pair.prompt for pair in pairs], on_progress=lambda done, total: None)
        model = checkpoint.load_model(dtype=dtype, device=target)
        denoiser = checkpoint.make_denoiser(model, dtype if dtype != torch.float32 else None)
        return count_activations(experts, denoiser, cache, pairs, seed=seed, device=target, on_step=on_step)


@torch.inference_mode()
def count_activations(
    experts: Sequence[Expert],
    denoiser: Denoiser,
    cache: PairCache,
    pairs: Sequence[PreferencePair],
    *,
    seed: int,
    device: torch.device | str,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Do what `collect_activation_counts` does, with a loaded model and an encoded dataset."""
    counter = ActivationCounter(experts)
    done = 0
    with counter.hook_modules(denoiser.model.named_modules()):
        for group in _groups_of_one_size(pairs, cache):
            _predict(denoiser, cache, group, seed, device)
            done += len(group)
            if on_step:
                on_step(done, len(pairs))
    return counter.counts


def _groups_of_one_size(pairs: Sequence[PreferencePair], cache: PairCache) -> list[list[PreferencePair]]:
    by_shape: dict[torch.Size, list[PreferencePair]] = {}
    for pair in pairs:
        by_shape.setdefault(cache.latents(pair)[1].shape, []).append(pair)
    return [
        group[start : start + _PAIRS_PER_PASS]
        for group in by_shape.values()
        for start in range(0, len(group), _PAIRS_PER_PASS)
    ]


def _predict(denoiser: Denoiser, cache: PairCache, pairs: Sequence[PreferencePair], seed: int, device) -> None:
    latents = torch.stack([cache.latents(pair)[1] for pair in pairs])
    noise, timesteps = torch.empty_like(latents), torch.empty(len(pairs), dtype=torch.int64)
    for index, pair in enumerate(pairs):
        generator = seeded_generator(seed, "calibration", pair.id)
        noise[index] = torch.randn(latents.shape[1:], generator=generator)
        timesteps[index] = torch.randint(NUM_TIMESTEPS, (), generator=generator)
    conditions = conditions_on(device, cache.conditions([pair.prompt for pair in pairs]))
    noisy = denoiser.add_noise(latents.to(device), noise.to(device), timesteps.to(device))
    denoiser.predict(noisy, timesteps.to(device), conditions)
