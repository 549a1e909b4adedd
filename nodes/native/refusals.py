"""What cannot be trained on, said before anything is drawn or computed, with what to do instead."""

import contextlib
import logging
from collections.abc import Iterator

from comfy.taesd.taesd import TAESD

from ...errors import InputError
from . import identity
from .adapters import target_layers

logger = logging.getLogger(__name__)

_PICTURES = {2: "pictures", 3: "films"}  # dimensions of a latent -> what a VAE of them encodes
_PACKED = ("LTXAV", "MiniMaxH3")  # their latents are several tensors in one
_OTHER_WIDTH = ("mat1 and mat2 shapes", "normalized_shape")  # how torch begins to say that a condition does not fit
_ON_OTHERS = "train on the bf16, fp16, fp8 or GGUF file of the same model; the expert loads on this one too"


def check_family(patcher) -> None:
    """Raise where a MODEL cannot be trained on, and no other file of it either.

    Raises:
        InputError: the message names the reason.
    """
    model = patcher.model
    kinds = {type(model).__name__, *(base.__name__ for base in type(model).__mro__)}
    if kinds & set(_PACKED):
        raise InputError("this model packs sound and picture into one latent, which cannot be trained on: use another")
    if model.latent_format.latent_dimensions not in _PICTURES:
        raise InputError(
            f"{identity.family_name(type(model.model_config))} draws no pictures: connect a model that does"
        )


def check_model(patcher) -> None:
    """Raise where a MODEL's weights or latents cannot be trained through.

    Raises:
        InputError: the message names the kind and the remedy.
    """
    check_family(patcher)
    diffusion_model = patcher.model.diffusion_model
    names = {type(module).__name__.lower() for module in diffusion_model.modules()}
    modules = {type(module).__module__.lower() for module in diffusion_model.modules()}
    if any("nunchaku" in name for name in names | modules):
        raise InputError(f"this is a nunchaku (SVDQuant) model, whose kernels have no backward pass: {_ON_OTHERS}")
    if any("optimizedmodule" in name for name in names) or _is_compiled(patcher):
        raise InputError("this MODEL is compiled (torch.compile), and adapters cannot be put on it: train before it")
    for module in diffusion_model.modules():
        layout = str(getattr(getattr(module, "weight", None), "_layout_cls", "")).lower()
        if any(kind in layout for kind in ("int8", "convrot", "w4a", "svdquant", "awq")):
            raise InputError(f"this model's weights are quantised as {layout}, without a backward pass: {_ON_OTHERS}")
    if next(target_layers(patcher.model, "attention"), None) is None:
        family = identity.family_name(type(patcher.model.model_config))
        raise InputError(f"{family} has no attention layers in its blocks, which alone are trained: use another model")


def problem_of(patcher) -> str | None:
    """Return why a MODEL cannot be trained on, or None."""
    try:
        check_model(patcher)
    except InputError as error:
        return str(error)
    return None


def _is_compiled(patcher) -> bool:
    wrappers = patcher.model_options.get("transformer_options", {}).get("wrappers", {})
    groups = [*wrappers.values(), *patcher.wrappers.values()]
    return any("compile" in str(name).lower() for group in [patcher.attachments, *groups] for name in group)


def more_than_weights(patcher) -> list[str]:
    """Return the names of attention patches, wrappers and hooks that a MODEL carries beside its weights."""
    options = patcher.model_options.get("transformer_options", {})
    found = [
        name for name in ("patches", "patches_replace", "wrappers", "callbacks", "sample_sigmas") if options.get(name)
    ]
    found += [name for name in ("model_function_wrapper", "sampler_cfg_function") if patcher.model_options.get(name)]
    return [*found, *(["wrappers of the model"] if any(patcher.wrappers.values()) else [])]


def drop_what_is_no_weight(patcher) -> None:
    """Take off attention patches, wrappers and hooks: they have a state for each call. Weight patches stay."""
    if dropped := more_than_weights(patcher):
        logger.warning("training without %s of the MODEL: only its weights are trained on", ", ".join(dropped))
    patcher.model_options = {"transformer_options": {}}
    patcher.wrappers, patcher.hook_patches, patcher.forced_hooks = {}, {}, None


def check_vae(model, vae) -> None:
    """Raise where ComfyUI knows that a VAE's latents are not those that the model draws in.

    Raises:
        InputError: the message names both; or there is none.
    """
    if getattr(vae, "first_stage_model", vae) is None:
        raise InputError("vae holds no VAE: the checkpoint has none; load the model's own with VAELoader")
    wanted = model.latent_format
    channels, dimensions = getattr(vae, "latent_channels", None), getattr(vae, "latent_dim", None)
    remedy = "connect the VAE that belongs to the model"
    name = type(wanted).__name__
    if channels is not None and channels != wanted.latent_channels:
        raise InputError(
            f"the VAE gives {channels} channels and this model draws in {wanted.latent_channels} ({name}): {remedy}"
        )
    # FLUX and Qwen-Image both have 16, but one encodes pictures and the other films; a TAESD stands in for either.
    if dimensions and {dimensions, wanted.latent_dimensions} == {2, 3} and not isinstance(vae.first_stage_model, TAESD):
        raise InputError(
            f"this VAE encodes {_PICTURES[dimensions]}, and this model draws in latents of a VAE of "
            f"{_PICTURES[wanted.latent_dimensions]} ({name}): {remedy}"
        )


def check_latents(model, latents) -> None:
    """Raise where a VAE's latents [b, c, …] are not what the model draws in.

    Raises:
        InputError: the message names both.
    """
    expected = model.latent_format.latent_channels
    if latents.shape[1] != expected:
        raise InputError(
            f"the VAE gives {latents.shape[1]} channels and this model draws in {expected}: "
            "connect the VAE that belongs to the model"
        )


@contextlib.contextmanager
def clip_named() -> Iterator[None]:
    """Inside, a model computes on what a CLIP gave; torch's sentence about matrices becomes one about the CLIP.

    Raises:
        InputError: the condition is of another width than the model takes.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in _OTHER_WIDTH):
            raise
        raise InputError(
            "clip is not this model's: it gives prompts in another width than the model takes; connect the model's own "
            "text encoder, loaded with the `type` that belongs to the model"
        ) from error
