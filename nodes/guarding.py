"""A guard around a model's predictions: it asks for a few more of them and changes the one for the prompt.

It works with every sampler and guider that asks ComfyUI for the prediction of its "positive" conditioning, at any CFG.
The predictions it needs are made apart from those the guider asked for, so that these stay what they are to the bit.
Everything it finds out while sampling lives in one `_Sampling`, made anew for each.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import comfy.sampler_helpers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..guards.evidence import Evidence
from ..guards.guidance import (
    SldMomentum,
    SldPreset,
    away_from_concept,
    away_from_gradient,
    distance,
    nearest_concept,
    presence,
    sld_gradient,
)
from .applied import AppliedExpert, applied_experts
from .gating import GUARD_ROWS, transformer_options_of
from .sampling import Condition

Method = Literal["pair", "sld", "casg"]

_KEY = "safety_experts_pair_guard_"
_KNOWN_CONDITIONINGS = {"positive", "negative", "empty_negative_prompt"}
# What a conditioning says of its text, and of where and when it holds: a guard's conditionings have their own text and
# hold everywhere; all else (control, reference images, guidance, hooks) they share with the prompt.
_OF_ITS_OWN = {
    "cross_attn", "pooled_output", "attention_mask", "conditioning_llama3", "conditioning_byt5small", "t5xxl_ids",
    "t5xxl_weights", "model_conds", "uuid", "area", "mask", "strength", "mask_strength", "set_area_to_bounds",
    "start_percent", "end_percent", "clip_start_percent", "clip_end_percent", "timestep_start", "timestep_end",
    "default",
}  # fmt: skip
_numbers = itertools.count()

Opens = Callable[[Tensor], Tensor]  # cross-attention context [b, t, d] -> bool [b, concepts]


@dataclass(frozen=True)
class GuardConcept:
    """What to guard against: conditionings of an unsafe concept and of its safe twin.

    Attributes:
        categories: that it stands for; more than one only where concepts were joined.
        strength: k; 0 is off.
        is_allowed: it never acts; where it is nearer to what is drawn than the others are, none acts.
    """

    categories: tuple[str, ...]
    strength: float
    unsafe: Condition = field(repr=False)
    safe: Condition = field(repr=False)
    is_allowed: bool = False


@dataclass(frozen=True)
class Guard:
    """A guard's settings.

    Attributes:
        concepts: for `sld` one, for `casg` with the empty prompt as the safe twin of all.
        preset: for `sld` and `casg`.
        opens_by_text: which concepts may act by the prompt's conditioning; None: all.
        threshold: presence above which a concept acts; minus infinity: the nearest one always does.
        deciding_part: part of the steps that the presence is gathered in.
        start_percent, end_percent: of the sampling.
        skips_covered: leave concepts out of which an expert on the model covers every category.
    """

    method: Method
    concepts: Sequence[GuardConcept]
    preset: SldPreset
    opens_by_text: Opens | None = None
    threshold: float = 0.4
    deciding_part: float = 1 / 3
    start_percent: float = 0.0
    end_percent: float = 1.0
    skips_covered: bool = True


def add_guard(model, guard: Guard):
    """Return a clone of a ModelPatcher that is sampled with the guard. Guards stack, in any order with experts."""
    key = f"{_KEY}{next(_numbers)}"

    def outer_sample(executor, noise, latent_image, sampler, sigmas, *arguments, **options):
        guider = executor.class_obj
        with _Sampling(guard, key, guider, sigmas):
            return executor(noise, latent_image, sampler, sigmas, *arguments, **options)

    guarded = model.clone()
    guarded.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, outer_sample)
    return guarded


class _Sampling:
    """One sampling with a guard: its wrappers, in a guider's options of this sampling alone, and what it found."""

    def __init__(self, guard: Guard, key: str, guider, sigmas: Tensor):
        _check_guider(guider)
        patcher = guider.model_patcher
        experts = applied_experts(patcher)
        covered = {name for applied in experts for name in applied.covered} if guard.skips_covered else set()
        concepts = [c for c in guard.concepts if c.is_allowed or (c.strength and not set(c.categories) <= covered)]
        if all(concept.is_allowed for concept in concepts):
            concepts = []
        self._guard, self._key, self._guider = replace(guard, concepts=concepts), key, guider
        self._in_weights = [applied for applied in experts if applied.is_in_weights]
        schedule = patcher.get_model_object("model_sampling")
        self._first_sigma = schedule.percent_to_sigma(guard.start_percent)
        self._last_sigma = schedule.percent_to_sigma(guard.end_percent)
        self._sigmas = [float(sigma) for sigma in sigmas]
        inside = [number for number, sigma in enumerate(self._sigmas[:-1]) if self._is_inside(sigma)]
        own_sigmas = self._sigmas[inside[0] : inside[-1] + 2] if inside else []
        allowed = [concept.is_allowed for concept in concepts]
        self._evidence = Evidence(own_sigmas, guard.deciding_part, guard.threshold, allowed)
        self._momentum = SldMomentum(guard.preset)
        self._may_act = self._acting_by_text()  # [1 or b, concepts]
        self._chosen: Tensor | None = None  # once decided
        self._num_conds: int | None = None  # in the call of this step that the prompt's prediction is taken from
        self._is_guards_pass = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _is_inside(self, sigma: float) -> bool:
        return self._last_sigma <= sigma <= self._first_sigma

    def _acting_by_text(self) -> Tensor:
        concepts = self._guard.concepts
        if self._guard.opens_by_text is None or not concepts:
            return torch.ones(1, len(concepts), dtype=torch.bool)
        contexts = [entry["cross_attn"] for entry in self._guider.conds["positive"] if "cross_attn" in entry]
        # A prompt of several parts (areas, masks, times) is unsafe where any of them is.
        opened = [self._guard.opens_by_text(context) for context in contexts]
        if len({len(rows) for rows in opened}) > 1:
            opened = [rows.any(dim=0, keepdim=True) for rows in opened]
        return torch.stack(opened).any(dim=0).cpu() if opened else torch.zeros(1, len(concepts), dtype=torch.bool)

    def __enter__(self) -> None:
        if not any(self._may_act[:, i].any() for i, c in enumerate(self._guard.concepts) if not c.is_allowed):
            return
        self._add_conditionings()
        options = self._guider.model_options  # a clone that ComfyUI made for this sampling
        for kind, wrapper in (
            (WrappersMP.PREDICT_NOISE, self._on_step),
            (WrappersMP.CALC_COND_BATCH, self._on_predictions),
            (WrappersMP.APPLY_MODEL, self._on_forward),
        ):
            add_wrapper_with_key(kind, self._key, wrapper, options, is_model_options=True)
        for applied in self._in_weights:
            self._handles += _close_on(self._guider.model_patcher.model, applied, lambda: self._is_guards_pass)

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add_conditionings(self) -> None:
        """Put the guard's conditionings beside the guider's, where ComfyUI prepares them as it does its own."""
        prompt: dict[str, Any] = next(iter(self._guider.conds["positive"]), {})
        shared = {name: value for name, value in prompt.items() if name not in _OF_ITS_OWN}
        names: dict[int, str] = {}  # the same conditioning is predicted once
        self._names: list[tuple[str, str]] = []
        for concept in self._guard.concepts:
            pair = []
            for condition in (concept.unsafe, concept.safe):
                name = names.setdefault(id(condition), f"{self._key}:{len(names)}")
                if name not in self._guider.conds:
                    own = comfy.sampler_helpers.convert_cond(condition)
                    self._guider.conds[name] = [{**shared, "prompt_type": "positive", **entry} for entry in own]
                pair.append(name)
            self._names.append((pair[0], pair[1]))

    def _on_step(self, executor, *arguments, **options):
        self._num_conds = None
        return executor(*arguments, **options)

    def _on_forward(self, executor, x, sigma, c_concat=None, c_crossattn=None, *arguments, **options):
        found = transformer_options_of(arguments, options)
        self._is_guards_pass = found.get(GUARD_ROWS) == self._key
        if self._is_guards_pass:  # patches tell prompt and negative apart by the place in the list
            found["cond_or_uncond"] = [0] * len(found.get("cond_or_uncond", ()))
        try:
            return executor(x, sigma, c_concat, c_crossattn, *arguments, **options)
        finally:
            self._is_guards_pass = False

    def _on_predictions(self, executor, model, conds, x: Tensor, timestep: Tensor, model_options):
        found = executor(model, conds, x, timestep, model_options)
        place = self._place_of_prompt(conds)
        sigma = float(timestep.max())
        if place is None or not self._is_inside(sigma):
            return found

        def predict(names: Sequence[str]) -> dict[str, Tensor]:
            options = {**model_options, "transformer_options": {**model_options.get("transformer_options", {})}}
            options["transformer_options"][GUARD_ROWS] = self._key
            rows = executor(model, [self._guider.conds[name] for name in names], x, timestep, options)
            return dict(zip(names, rows, strict=True))

        changed = self._change(found[place], x, timestep, sigma, predict)
        return found if changed is None else [*found[:place], changed, *found[place + 1 :]]

    def _place_of_prompt(self, conds: Sequence) -> int | None:
        """Return which of the predictions is the prompt's, or None where the call is not for this step's guidance.

        Perturbed-attention and skip-layer guidance ask once more for the prompt alone, with a model they have damaged.
        """
        prompt = self._guider.conds["positive"]
        if not prompt:
            return None
        for place, cond in enumerate(conds):
            if cond and cond[0]["uuid"] == prompt[0]["uuid"]:
                if self._num_conds is None:
                    self._num_conds = len(conds)
                return place if len(conds) == self._num_conds else None
        return None

    def _change(self, prompt: Tensor, x: Tensor, timestep: Tensor, sigma: float, predict) -> Tensor | None:
        """Return the changed prediction for the prompt; None where it stays as it is."""
        is_decided = self._evidence.is_decided(sigma)
        decided: Tensor | None = None
        if is_decided:
            if self._chosen is None:
                self._chosen = self._evidence.chosen(self._may_act)
            decided = self._chosen
            if bool((decided < 0).all()):
                return None
        wanted = self._may_act.any(dim=0).nonzero().flatten().tolist()
        if decided is not None and self._guard.method != "casg":
            wanted = sorted({index for index in decided.tolist() if index >= 0})
        names = list(dict.fromkeys(name for index in wanted for name in self._names[index]))
        predictions = predict(names)
        pairs = {index: tuple(predictions[name] for name in self._names[index]) for index in wanted}
        if decided is None:
            presences, distances = torch.zeros(2, len(prompt), len(self._names), device=prompt.device)
            for index, (unsafe, safe) in pairs.items():
                presences[:, index] = presence(prompt, unsafe, safe, x)
                distances[:, index] = distance(prompt, unsafe, x)
            self._evidence.add(sigma, presences, distances)
        chosen = self._evidence.chosen(self._may_act) if decided is None else decided
        if self._guard.method == "pair":
            return self._away_from_concepts(prompt, pairs, chosen)
        return self._away_from_gradient(prompt, pairs, chosen, timestep, sigma)

    def _strengths(self, chosen: Tensor) -> Tensor:
        """Return the strength of each image's concept, [b]; 0 where none is open."""
        values = torch.tensor([*(concept.strength for concept in self._guard.concepts), 0.0], device=chosen.device)
        return values[chosen]  # -1 is the last

    def _away_from_concepts(self, prompt: Tensor, pairs: Mapping[int, tuple], chosen: Tensor) -> Tensor | None:
        if (chosen < 0).all():
            return None
        unsafe, safe = _of_chosen(pairs, chosen, 0), _of_chosen(pairs, chosen, 1)
        changed = away_from_concept(prompt, unsafe, safe, self._strengths(chosen))
        return _where(chosen >= 0, changed, prompt)

    def _away_from_gradient(
        self, prompt: Tensor, pairs: Mapping[int, tuple], chosen: Tensor, timestep: Tensor, sigma: float
    ) -> Tensor | None:
        is_open = chosen >= 0
        empty = next(iter(pairs.values()))[1]
        if self._guard.method == "casg":
            known = torch.tensor([*pairs], device=prompt.device)
            nearest = nearest_concept(prompt, torch.stack([unsafe for unsafe, _ in pairs.values()]), empty)
            chosen = known[nearest]
        unsafe = _of_chosen(pairs, chosen, 0)
        gradient = sld_gradient(prompt, unsafe, empty, timestep, self._guard.preset)
        gradient = self._momentum.add(gradient, sigma)
        if not is_open.any() or self._part_done(sigma) < self._guard.preset.warmup:
            return None
        changed = away_from_gradient(prompt, gradient, timestep, self._strengths(chosen))
        return _where(is_open, changed, prompt)

    def _part_done(self, sigma: float) -> float:
        """Return how much of the steps lies before a noise level, 0..1."""
        before = sum(other > sigma * (1 + 1e-5) for other in self._sigmas[:-1])
        return before / max(len(self._sigmas) - 1, 1)


def _check_guider(guider) -> None:
    """Refuse a guider of which it is not known how the prompt enters.

    Raises:
        InputError: it has no positive conditioning, or one that no guard expects.
    """
    unknown = {name for name in guider.conds if not name.startswith(_KEY)} - _KNOWN_CONDITIONINGS
    if unknown or "positive" not in guider.conds:
        raise InputError(
            f"Pair Guard does not know how {type(guider).__name__} joins its prompts, so it might leave one unguarded; "
            "use KSampler, CFGGuider, BasicGuider or another guider with one positive prompt"
        )


def _of_chosen(pairs: Mapping[int, tuple[Tensor, Tensor]], chosen: Tensor, which: int) -> Tensor:
    """Return each image's prediction of its own concept, [b, …]; where none is chosen, any."""
    result = next(iter(pairs.values()))[which]
    for index, pair in pairs.items():
        result = _where(chosen == index, pair[which], result)
    return result


def _where(images: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(images.reshape(-1, *[1] * (b.ndim - 1)).to(b.device), a, b)


def _close_on(model: nn.Module, applied: AppliedExpert, is_closed: Callable[[], bool]) -> list:
    """Take an expert that is in the weights back where a guard asks; return the handles of the hooks."""
    handles = []
    for name, layer in applied.expert.layers.items():
        key: Any = applied.keys[name]
        weight_key, part = (key, None) if isinstance(key, str) else (key[0], key[1])
        if weight_key.startswith("diffusion_model."):
            module = comfy.utils.get_attr(model, weight_key.removesuffix(".weight"))
            handles.append(module.register_forward_hook(_TakenBack(layer, part, is_closed)))
    return handles


class _TakenBack:
    """A forward hook that subtracts what a LoRA layer in the weights adds to a module's output.

    Args:
        part: (dimension, start, length) of the output, where the layer changes a slice of a fused weight.
    """

    def __init__(self, layer, part: tuple[int, int, int] | None, is_closed: Callable[[], bool]):
        self._down, self._up = layer.down, layer.up.float() * layer.scale
        self._part, self._is_closed = part, is_closed

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._is_closed():
            return output
        x = inputs[0]
        self._down, self._up = self._down.to(x), self._up.to(x)
        if isinstance(module, nn.Conv2d):
            hidden = functional.conv2d(x, self._down, None, module.stride, module.padding, module.dilation)
            return output - functional.conv2d(hidden, self._up)
        added = functional.linear(functional.linear(x, self._down), self._up)
        if self._part is None:
            return output - added
        _, start, length = self._part
        changed = output.clone()
        changed[..., start : start + length] -= added
        return changed
