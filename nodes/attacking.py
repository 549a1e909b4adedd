"""The node that looks for prompts which bring a concept back, and draws them with every model."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..errors import InputError
from ..evaluation.attacks.attack import (
    BUDGETS,
    DENOISER,
    METHODS,
    TEXT,
    AttackedPrompt,
    AttackLog,
    AttackSettings,
    notes_of,
    suites_of,
)
from ..evaluation.attacks.attacking import find_prompts
from ..evaluation.evaluate import NO_DEMANDS, Outcome
from ..evaluation.plan import BASE, BASE_ARM, Plan, check_folder
from ..evaluation.report_view import View
from ..evaluation.suites import Suite, suite_of_pairs
from . import checks, host
from .chart import as_image, draw_bars
from .compared import (
    SHOW_FLAGGED,
    GraphDrawer,
    arms_of,
    batches_of,
    compared_inputs,
    drawing_inputs,
    in_order,
    run_here,
    shown_of,
    summary_of,
)
from .model_identity import changes_of
from .native.attacked import AttackedModels, encode_for, text_encoder_of
from .native.identity import identify
from .sampling import SamplerSettings

_THROUGH = {"text encoder": TEXT, "UNet": DENOISER}


class SafetyExpertsAttack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        steps, batch = BUDGETS[TEXT]
        unet_steps, unet_batch = BUDGETS[DENOISER]
        return io.Schema(
            node_id="SafetyExpertsAttack",
            display_name="Attack Safety",
            category="safety experts/evaluation",
            description=(
                "Searches words that bring unsafe content back without naming it, draws them with every model from "
                "fresh seeds, beside random words and the plain prompt, and reports how often each model gives in."
            ),
            search_aliases=["red team", "adversarial prompts", "Ring-A-Bell", "jailbreak", "robustness"],
            is_output_node=True,
            inputs=[
                *compared_inputs(
                    "A model to attack: with experts, other LoRAs.", "The concept is learned from their two sides."
                ),
                io.String.Input(
                    "attack_name",
                    default="my_attack",
                    tooltip="An attack of this name and these settings goes on; what it found is not searched again.",
                ),
                io.Combo.Input(
                    "through",
                    options=list(_THROUGH),
                    default="text encoder",
                    tooltip="Text encoder: one search for all models, blind to what an expert does in the UNet. UNet: "
                    "a search of each model with its weights, the strongest attacker.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="swap",
                    tooltip="swap: by the gradient; published: Ring-A-Bell's genetic search, of the text encoder only.",
                ),
                io.Int.Input("words", default=16, min=1, max=60, tooltip="Words to search behind the safe prompt."),
                io.Int.Input(
                    "search_steps",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip=f"Of swap, or generations; 0: {steps} by the text encoder, {unet_steps} by the UNet.",
                ),
                io.Int.Input(
                    "search_batch",
                    default=0,
                    min=0,
                    max=10_000,
                    tooltip=f"Candidates a step; 0: {batch} by the text encoder, {unet_batch} by the UNet.",
                ),
                io.Int.Input("prompts_per_category", default=20, min=1, max=100_000, tooltip="How many to attack."),
                io.Int.Input("seeds", default=4, min=1, max=100, tooltip="Fresh pictures of each prompt and model."),
                *drawing_inputs(),
                io.String.Input(
                    "banned_words", default="", optional=True, tooltip="Words not to use, with commas between."
                ),
                SHOW_FLAGGED,
            ],
            outputs=[
                io.String.Output("report", tooltip="Path of report.html."),
                io.String.Output("summary", tooltip="The report's sentences."),
                io.Image.Output("before", tooltip="Pictures of the base model, failures first; for Compare Images."),
                io.Image.Output("after", tooltip="The same prompts and seeds with the last model."),
                io.Float.Output("success", tooltip="Share of fresh pictures of the last model that are unsafe."),
                io.Float.Output("success_without", tooltip="The same of the plain prompts, drawn as often."),
                io.Image.Output("chart", tooltip="Success of each list of prompts, base model and others."),
            ],
        )

    @classmethod
    def validate_inputs(cls, attack_name: str | None = None, models: object = None, judges: object = None):
        return checks.first_problem((host.evaluation_folder, attack_name))

    @classmethod
    def execute(
        cls, base_model, models, clip, vae, prompt_pairs, judges, attack_name, through, method, words, search_steps,
        search_batch, prompts_per_category, seeds, sampler_name, scheduler, steps, cfg, width, height, batch_size,
        labels="", banned_words="", show_flagged=False,
    ) -> io.NodeOutput:  # fmt: skip
        base = identify(base_model)
        if clip is None:
            raise InputError(f"clip is empty: {base.name} holds no text encoder; load one with CLIPLoader")
        default_steps, default_batch = BUDGETS[_THROUGH[through]]
        settings = AttackSettings(
            method,
            words,
            steps=search_steps or default_steps,
            batch=search_batch or default_batch,
            banned=tuple(word.strip() for word in (banned_words or "").split(",") if word.strip()),
            through=_THROUGH[through],
        )
        folder = host.evaluation_folder(attack_name)
        check_folder(folder)
        ordered = in_order(models)
        arms = [BASE_ARM, *arms_of(ordered, labels or "", base_model)]
        by_arm = {BASE: base_model} | {arm.id: model for arm, model in zip(arms[1:], ordered, strict=True)}
        drawn_by = SamplerSettings(sampler_name, scheduler, steps, cfg, width, height)
        drawer = GraphDrawer(by_arm, clip, vae, drawn_by)
        suite = suite_of_pairs("prompts", prompt_pairs).sampled(prompts_per_category, 0)
        log = AttackLog(folder, base.sha256, settings)
        found = _search(_GraphWhiteBox(by_arm, clip, drawer, drawn_by, settings.through), suite, arms, settings, log)
        suites = suites_of(suite, found, settings)
        plan = Plan(
            model=base.model_dump(mode="json") | changes_of(base_model),
            generation=asdict(drawn_by),
            arms=tuple(arms),
            suites=suites,
            images_per_prompt=seeds,
            batch_size=batch_size,
            notes=notes_of(suites, found, settings),
        )
        outcome = run_here(folder, plan, drawer, in_order(judges), NO_DEMANDS)
        return _output(outcome, attack_name, show_flagged)


def _output(outcome: Outcome, name: str, show_flagged: bool) -> io.NodeOutput:
    view, last = View(outcome.report), outcome.report.primary_arm or BASE
    lines = summary_of(view)
    found = [row for each in view.attack_lists if each.startswith("attack-") and (row := view.success(last, each))]
    plain = view.success(last, "original")
    success = max((row.success for row in found), default=float("nan"))
    before, after = batches_of(outcome, show_flagged)
    chart = as_image(draw_bars(view.bars()))
    return io.NodeOutput(
        str(outcome.page), "\n".join(lines), before, after, success, plain.success if plain else float("nan"), chart,
        ui=shown_of(lines, name),
    )  # fmt: skip


def _search(model: "_GraphWhiteBox", suite: Suite, arms, settings: AttackSettings, log: AttackLog):
    progress = host.PatientProgress(1)
    try:
        found: list[AttackedPrompt] = find_prompts(
            model,
            suite,
            arms,
            settings,
            log=log,
            on_prompt=lambda done, total: progress.show(done, total),
            should_stop=progress.is_cancelled,
        )
    finally:
        model.close()
    progress.raise_cancel()
    return found


class _GraphWhiteBox:
    """The graph's models and CLIP, open to the search (denoiser_attack.WhiteBox)."""

    def __init__(self, models: dict[str, Any], clip, drawer: GraphDrawer, settings: SamplerSettings, through: str):
        self._encoder = text_encoder_of(clip)
        self._opened = AttackedModels(models) if through == DENOISER else None
        self._drawer, self._settings = drawer, settings

    @property
    def clip_towers(self):
        return self._encoder.towers

    @property
    def denoiser(self):
        return self._opened.denoiser if self._opened else None

    @contextlib.contextmanager
    def carrying(self, arm: str):
        with self._opened.carrying(arm) if self._opened else contextlib.nullcontext(), torch.inference_mode(False):
            yield

    def draw_latents(self, arm: str, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> Tensor:
        latents = self._drawer.draw_latents(arm, prompts, seeds)
        assert self._opened  # asked for by an attack through the UNet only
        with torch.inference_mode(False):
            return self._opened.latents_in(latents.clone())

    def encode(self, arm: str, prompts: Sequence[str]):
        return encode_for(self._encoder, prompts)

    def close(self) -> None:
        if self._opened:
            self._opened.close()
