"""A recipe holds every training option as one value; it travels in the expert's metadata.

Shipped recipes are the YAML files in `recipes/`; `load_recipe` takes one of their names or a file of your own.
"""

import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from ..errors import InputError, did_you_mean
from ..experts.expert import Expert
from ..key_values import parse_key_values
from ..plain_yaml import load_yaml
from ..preferences.verdicts import TrainingRule
from .objectives import OBJECTIVES, Parameters

RECIPES_FOLDER = Path(__file__).parent / "recipes"


def _read_objectives(value: Any) -> dict[str, Parameters]:
    """Return the parameters of each objective, from a name, name -> weight, or name -> parameters."""
    chosen = {value: {}} if isinstance(value, str) else value
    if not isinstance(chosen, dict):
        raise ValueError("must be the name of an objective, or `name: {parameter: value}` lines")
    objectives, known = {}, ", ".join(OBJECTIVES)
    for name, given in chosen.items():
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}{did_you_mean(str(name), OBJECTIVES) or f'; known: {known}'}")
        kind = OBJECTIVES[name].parameters
        values = {"weight": given} if isinstance(given, int | float) else given or {}
        values = values.model_dump() if isinstance(values, Parameters) else values
        try:
            objectives[name] = kind.model_validate(values)
        except ValidationError as error:
            raise ValueError(f"{name}: {_in_words(error, kind)}") from error
    return objectives


def _in_words(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a validation error as one line that names each wrong field."""
    problems = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            remedy = did_you_mean(field, model.model_fields) or f"; known: {', '.join(model.model_fields)}"
            problems.append(f"unknown field {field!r}{remedy}")
        elif item["type"] == "value_error":
            problems.append(f"{field}: {message}" if field else message)
        else:
            problems.append(f"{field}: {message}, got {reprlib.repr(item['input'])}" if field else message)
    return "; ".join(problems)


class Recipe(BaseModel):
    """Training options. A field's description is also its tooltip; defaults are AlignGuard's (methods §1.2)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("", max_length=200, description="What the recipe is called; a shipped one's name.")
    objective: Annotated[dict[str, SerializeAsAny[Parameters]], BeforeValidator(_read_objectives)] = Field(
        {"sigmoid": Parameters(weight=1.0)},
        description=f"Preference loss: {', '.join(OBJECTIVES)}; or a mapping, which mixes several and sets their "
        "parameters: {kto: {weight: 1}}; {} is none.",
    )
    beta: float = Field(
        5000.0, gt=0, description="Pull towards the base model, for the logit (beta/2) x mean squared error difference."
    )
    target_gradient_factor: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="Lower beta from step to step so that pairs pull with this share of the full gradient, say 0.2.",
    )
    winner_preserving: float | None = Field(
        None, ge=0, le=1, description="Diffusion-SDPO's mu: scale the rejected gradient so the chosen cannot get worse."
    )
    sft_weight: float = Field(0.0, ge=0, description="Weight of the plain denoising error on the chosen image.")
    flow_error: Literal["velocity", "x0"] = Field(
        "velocity", description="What SD3 and FLUX compare: velocities, or the images that follow from them (DUO)."
    )
    reference_epochs: int = Field(
        0,
        ge=0,
        description="Draw noise levels and noises for so many epochs, then repeat them, so that the reference model "
        "need not run again (its predictions are kept beside the dataset); 0: always new draws.",
    )
    shared_timestep: bool = Field(True, description="One noise level for both images of a pair; DUO draws two.")
    anchor_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean squared change on safe and empty prompts; 0 is the paper's recipe.",
    )
    anchor_samples: Literal["images", "noise"] = Field(
        "images",
        description="Anchor on noisy chosen images, or on pure noise at the last timestep under no prompt (DUO).",
    )
    anchor_every: int = Field(
        1,
        ge=1,
        description="Compute the anchor in every so many forward passes only, weighing as many times as much: cheaper.",
    )
    anchor_empty_fraction: float = Field(
        0.25, ge=0, le=1, description="Fraction of anchor samples under the empty prompt instead of the safe one."
    )
    redirect: bool = Field(
        False,
        description="Train the unsafe prompt to predict what the base model predicts under the safe one (residual R), "
        "with the change on retained prompts (leak) as a second term; beta then counts in units of 1 / Q.",
    )
    leak_budget: float | None = Field(
        None,
        gt=0,
        description="Largest mean change on held-out retained prompts, as a part of the change that is wanted (Q). "
        "Training stops at the first measurement within it that reaches residual_target; the best within it is kept.",
    )
    worst_leak_factor: float = Field(
        3.0, ge=1, description="How many times leak_budget the worst category or file may leak."
    )
    residual_target: float | None = Field(
        None, gt=0, le=1, description="Held-out residual R to stop at; empty: (1/3 / guidance)^2."
    )
    guidance: float | None = Field(
        None,
        ge=0,
        description="Guidance that the model is drawn with, for residual_target; empty: the dataset's, else 7.5.",
    )
    leak_control: Literal["constant", "dual", "barrier"] = Field(
        "constant",
        description="Weight of the leak (lambda): leak_weight always, raised and lowered with the leak, or "
        "leak_weight divided by the share of the budget that is left.",
    )
    leak_weight: float = Field(0.1, gt=0, description="Weight of leak / leak_budget beside R, or its start (dual).")
    retain_fraction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Fraction of anchor or leak samples under prompts of the dataset's other categories and of what "
        "--retain gives, instead of safe and empty ones.",
    )
    retain_by_leak: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Part of those samples that goes to categories and files by their leak when last measured, so that "
        "the worst gets most; the others are drawn equally often. Needs a leak_budget.",
    )
    caption_dropout_fraction: float = Field(
        0.2, ge=0, le=1, description="Fraction of pairs trained under the empty prompt."
    )
    rank: int = Field(4, ge=1, le=1024, description="LoRA rank.")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha; empty means equal to the rank (scale 1).")
    targets: Literal["attention", "self-attention", "cross-attention"] = Field(
        "attention",
        description="Which attention layers (to_q, to_k, to_v, to_out) get a LoRA; SD3 and FLUX know attention only.",
    )
    steps: int = Field(2000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, description="Pairs in one forward pass, of all processes together.")
    accumulation_steps: int = Field(4, ge=1, description="Forward passes an optimizer step; they add up to its batch.")
    learning_rate: float = Field(1.6e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant_with_warmup", description="Learning-rate schedule over the steps."
    )
    warmup_steps: int = Field(500, ge=0, description="Steps over which the learning rate rises from 0.")
    weight_decay: float = Field(1e-2, ge=0, description="AdamW weight decay on the LoRA weights.")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="Decay of the averaged weights the expert is made of; 0: none."
    )
    held_out_fraction: float = Field(0.0, ge=0, lt=1, description="Fraction of the pairs to measure on, not train on.")
    held_out_pairs: int | None = Field(None, ge=1, description="Hold out so many pairs at most; empty: no limit.")
    evaluate_steps: int = Field(50, ge=1, description="Measure the held-out pairs every so many steps.")
    patience: int = Field(
        0,
        ge=0,
        description="Stop after so many measurements without a better held-out loss; 0: never. The best is kept.",
    )
    max_drift: float | None = Field(
        None,
        gt=0,
        description="Stop when the mean squared change on held-out safe prompts passes this; the best is kept.",
    )
    max_chosen_increase: float | None = Field(
        None,
        gt=0,
        description="Stop when held-out chosen images' error is above the base model's by this part; the best is kept.",
    )
    save_steps: int = Field(100, ge=1, description="Write the resumable state every so many steps.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    first_timestep: int = Field(0, ge=0, le=999, description="Smallest noise level trained (0 is least noisy).")
    last_timestep: int = Field(999, ge=0, le=999, description="Largest noise level trained.")
    resolution: int | None = Field(
        None,
        ge=64,
        description="Bring images of more than this many pixels squared into aspect-ratio buckets of that area; empty: "
        "train at the size they have.",
    )
    pairs: TrainingRule = Field(
        "all",
        description="Pairs to train on: all, those the judges agree with (agreed), or also those a reviewer accepted "
        "or flipped (agreed-or-accepted). Dropped pairs never are.",
    )
    horizontal_flip: bool = Field(False, description="Mirror half of the pairs, both images of a pair together.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto is bf16 where the device has it, fp16 on older GPUs, else fp32. The LoRA is fp32."
    )
    compile: bool = Field(False, description="torch.compile the model: minutes at the start, then faster steps.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, about 30 % slower.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random draw.")

    @model_validator(mode="after")
    def _check_timesteps(self) -> "Recipe":
        if self.first_timestep > self.last_timestep:
            raise ValueError(f"first_timestep {self.first_timestep} is above last_timestep {self.last_timestep}")
        watching = (self.patience or None, self.max_drift, self.max_chosen_increase, self.leak_budget)
        if any(option is not None for option in watching) and not self.held_out_fraction:
            raise ValueError(
                "patience, max_drift, max_chosen_increase and leak_budget watch held-out pairs: set held_out_fraction "
                "above 0"
            )
        return self

    @model_validator(mode="after")
    def _check_redirect(self) -> "Recipe":
        if self.redirect and self.leak_budget is None:
            raise ValueError("redirect needs a leak_budget, say 0.003")
        if self.redirect and (self.anchor_weight or self.sft_weight or self.anchor_every > 1):
            raise ValueError("redirect has terms of its own: set anchor_weight and sft_weight to 0, anchor_every to 1")
        if self.retain_by_leak and self.leak_budget is None:
            raise ValueError("retain_by_leak goes by measured leaks: set a leak_budget, say 0.003")
        if self.anchor_samples == "noise" and (self.redirect or self.retain_fraction):
            raise ValueError("anchor_samples=noise knows no prompts to retain: use images")
        return self

    @property
    def objective_name(self) -> str:
        """The objectives in words, such as "sigmoid" or "sigmoid + 0.5 mapo"."""
        weights = {"redirect": 1.0} if self.redirect else {}
        weights |= {name: chosen.weight for name, chosen in self.objective.items() if chosen.weight}
        return " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items()) or "none"

    @property
    def preference_weight(self) -> float:
        """The weights of all objectives together."""
        return sum(chosen.weight for chosen in self.objective.values())

    def anchor_weight_at(self, number: int) -> float:
        """Return the weight of the anchor in forward pass `number` (from 0); its mean over many is anchor_weight."""
        return 0.0 if number % self.anchor_every else self.anchor_weight * self.anchor_every

    @property
    def lora_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes in `recipes/`, sorted."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name or a YAML file by path, then apply `key=value` overrides.

    Raises:
        InputError: no such recipe, a field that does not exist, or a value out of its range.
    """
    path = RECIPES_FOLDER / f"{name_or_path}.yaml" if str(name_or_path) in shipped_recipes() else Path(name_or_path)
    try:
        values = load_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except OSError as error:
        raise InputError(
            f"no recipe {str(name_or_path)!r}: give a YAML file or one of {', '.join(shipped_recipes())}"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"{path} must hold `field: value` lines, got {type(values).__name__}")
    values = {"name": path.stem, **values, **_parse_overrides(overrides)}
    return make_recipe(_upgraded(values), source=str(name_or_path))


def recipe_of_expert(expert: Expert, overrides: Sequence[str] = ()) -> tuple[Recipe, str | None]:
    """Return (the recipe that an expert was trained by, its category or None for all), from its metadata.

    Raises:
        InputError: it holds none, because it was merged, extracted or made elsewhere.
    """
    trained = expert.info.trained
    if trained is None:
        raise InputError(
            f"{expert.name} holds no recipe: give an expert that `train` made, not a merged or a plain LoRA"
        )
    categories = expert.categories
    values = _upgraded(trained.recipe, drop_unused=True) | _parse_overrides(overrides)
    recipe = make_recipe(_upgraded(values), source=f"of {expert.name}")
    return recipe, categories[0] if len(categories) == 1 else None


def read_recipe(values: dict, *, source: str) -> Recipe:
    """Build a recipe from what an expert's metadata or a training state hold, of this version or an older one."""
    return make_recipe(_upgraded(values, drop_unused=True), source=source)


def _upgraded(values: dict, *, drop_unused: bool = False) -> dict:
    """Return a recipe of version 1, which had the objectives' parameters beside them, as one of now.

    Args:
        drop_unused: version 1 wrote the parameters of all objectives into metadata; leave out those of others.
    """
    values = dict(values)
    objective = values.get("objective", "sigmoid")
    chosen: Any = {objective: {}} if isinstance(objective, str) else objective
    if not isinstance(chosen, dict):
        return values
    for name, kind in OBJECTIVES.items():
        for field in kind.parameters.model_fields.keys() & values.keys():
            if name in chosen:
                given = chosen[name]
                own = {"weight": given} if isinstance(given, int | float) else given or {}
                chosen = {**chosen, name: {**own, field: values.pop(field)}}
                values["objective"] = chosen
            elif drop_unused:
                del values[field]
    return values


def _parse_overrides(overrides: Sequence[str]) -> dict[str, object]:
    return {key: _parse_value(text) for key, text in parse_key_values(overrides).items()}


def _parse_value(text: str) -> object:
    try:
        return float(text)  # YAML 1.1 reads 1e-3 as text; pydantic turns 8.0 into the int 8
    except ValueError:
        return load_yaml(text, "a value of --set")


def make_recipe(values: dict, *, source: str) -> Recipe:
    """Build a recipe from plain values; `source` is named in errors.

    Raises:
        InputError: one line naming each wrong field.
    """
    try:
        return Recipe(**values)
    except ValidationError as error:
        raise InputError(f"recipe {source}: {_in_words(error, Recipe)}") from error
