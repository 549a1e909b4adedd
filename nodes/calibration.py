"""Running a ComfyUI model on prompts while an ActivationCounter watches its layers (for Co-Merge)."""

import contextlib
import random

import comfy.lora
from comfy.model_patcher import PatcherInjection

from ..errors import InputError
from ..experts.co_merge import ActivationCounter
from . import host, sampling

INJECTION_KEY = "safety_experts_calibration"


def count_activations(
    counter: ActivationCounter,
    model,
    clip,
    prompt_pairs,
    *,
    num_prompts: int,
    steps: int,
    width_px: int,
    height_px: int,
) -> None:
    """Sample the unsafe prompts and let `counter` observe every layer that the experts change.

    Guidance is off (cfg 1), so that only the unsafe prompts are seen and not the empty one.

    Raises:
        InputError: the experts' layers are not in this model.
    """
    settings = sampling.SamplerSettings("euler", "normal", steps, 1.0, width_px, height_px)
    pairs = random.Random(0).sample(prompt_pairs, min(num_prompts, len(prompt_pairs)))
    watched = watch(model, counter)
    negative = sampling.encode_prompt(clip, "")
    progress = host.Progress(len(pairs) * steps)
    for pair in pairs:
        condition = sampling.encode_prompt(clip, pair.prompt)
        sampling.sample_latents(watched, [condition], [negative], [pair.seed], settings, progress.advance)


def watch(model, counter: ActivationCounter):
    """Return a clone of a ModelPatcher whose layers report to `counter` while it is loaded."""
    names = _layer_names(model, counter)
    hooks = contextlib.ExitStack()

    def inject(patcher) -> None:
        hooks.enter_context(counter.hook_modules(patcher.model.named_modules(), lambda path: names.get(path, ())))

    watched = model.clone()
    watched.set_injections(INJECTION_KEY, [PatcherInjection(inject=inject, eject=lambda patcher: hooks.close())])
    return watched


def _layer_names(model, counter: ActivationCounter) -> dict[str, list[str]]:
    """Return module path in ComfyUI's model -> kohya names, for all of the counter's layers.

    Several where an expert trained by checkpoint has apart what the model keeps in one weight: core's table then gives
    the weight and the rows.
    """
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    missing = [name for name in counter.layers if name not in keys]
    if missing:
        raise InputError(
            f"cannot calibrate on this model: {len(missing)} of {len(counter.layers)} layers of the experts "
            f"are not in it, first {missing[0]}; use the model they were trained on"
        )
    names: dict[str, list[str]] = {}
    for name in counter.layers:
        key = keys[name] if isinstance(keys[name], str) else keys[name][0]
        names.setdefault(key.removesuffix(".weight"), []).append(name)
    return names
