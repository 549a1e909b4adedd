"""Models held side by side, for Evaluate Safety and Attack Safety: their inputs, drawing, what is given back."""

import contextlib
import re
from collections.abc import Mapping, Sequence

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io, ui
from PIL import Image

from ..errors import InputError, SafetyExpertsError
from ..evaluation.evaluate import Demands, Outcome, conclude, run
from ..evaluation.pictures import HIDDEN_PX, Album
from ..evaluation.plan import Arm, Plan
from ..evaluation.quality import measure_quality
from ..evaluation.report_view import View
from ..evaluation.results import Evaluation
from . import host, pictures, sampling, sockets
from .applied import made_of
from .comfy_clip import ComfyClip
from .sampling import SamplerSettings

MAX_MODELS, MAX_JUDGES, MOST_SHOWN = 16, 8, 16
KEPT_PROMPTS = 512
SHOW_FLAGGED = io.Boolean.Input(
    "show_flagged", default=False, tooltip="Give pictures that a judge flags as they are, instead of pixelated."
)


def compared_inputs(model_tooltip: str, pairs_tooltip: str) -> list[io.Input]:
    """Return the inputs of what is held side by side: models, prompts, judges, and what to call the models."""
    models = io.Autogrow.TemplatePrefix(
        io.Model.Input("model", tooltip=model_tooltip), prefix="model_", min=1, max=MAX_MODELS
    )
    judges = io.Autogrow.TemplatePrefix(
        sockets.Judge.Input("judge", tooltip="From Safety Judge."), prefix="judge_", min=1, max=MAX_JUDGES
    )
    return [
        io.Model.Input("base_model", tooltip="The model without anything on it."),
        io.Autogrow.Input(
            "models", template=models, tooltip="The models to hold against the base; the report has one column each."
        ),
        io.Clip.Input("clip", tooltip="The text encoder of all the models."),
        io.Vae.Input("vae", tooltip="The VAE of all the models."),
        sockets.PromptPairs.Input("prompt_pairs", tooltip=pairs_tooltip),
        io.Autogrow.Input(
            "judges", template=judges, tooltip="Who looks at the pictures; a new socket appears for each."
        ),
        io.String.Input(
            "labels",
            default="",
            optional=True,
            tooltip="What the report calls the models, with commas between; empty: model 1, model 2, …",
        ),
    ]


def drawing_inputs() -> list[io.Input]:
    """Return the inputs of a KSampler that draws new pictures."""
    return [
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in the KSampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in the KSampler."),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Of the sampler, for each picture."),
        io.Float.Input(
            "cfg", default=7.5, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance, as in the KSampler."
        ),
        io.Int.Input("width", default=512, min=16, max=16384, step=8, tooltip="Pixels."),
        io.Int.Input("height", default=512, min=16, max=16384, step=8, tooltip="Pixels."),
        io.Int.Input("batch_size", default=4, min=1, max=256, tooltip="Images drawn together."),
    ]


class GraphDrawer:
    """Draws with the graph's models, as the stock KSampler does.

    Args:
        negatives: arm -> negative prompt, where it is not the empty one.

    Attributes:
        num_rows: the rows of predictions that were made.
    """

    def __init__(self, models: dict, clip, vae, settings: SamplerSettings, negatives: Mapping[str, str] | None = None):
        self._models = {arm: self._counted(model) for arm, model in models.items()}
        self._clip, self._vae, self._settings = clip, vae, settings
        self.num_rows = 0
        self._negatives = {arm: sampling.encode_prompt(clip, text) for arm, text in (negatives or {}).items()}
        self._empty = sampling.encode_prompt(clip, "")
        self._conditions: dict[str, sampling.Condition] = {}

    def draw(self, arm: str, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None) -> list[Image.Image]:
        return sampling.decode_latents(self._vae, self.draw_latents(arm, prompts, seeds))

    def draw_latents(self, arm: str, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """Return the latents [n, c, h, w] of what `draw` draws, in the VAE's scale."""
        if len(self._conditions) > KEPT_PROMPTS:
            self._conditions.clear()
        for prompt in prompts:  # once for all models
            if prompt not in self._conditions:
                self._conditions[prompt] = sampling.encode_prompt(self._clip, prompt)
        conditions = [self._conditions[prompt] for prompt in prompts]
        negative = [self._negatives.get(arm, self._empty)] * len(prompts)
        return sampling.sample_latents(self._models[arm], conditions, negative, seeds, self._settings)

    def _counted(self, model):
        def count(executor, x, *arguments, **options):
            self.num_rows += len(x)
            return executor(x, *arguments, **options)

        counted = model.clone()
        counted.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "safety_experts_rows", count)
        return counted


def run_here(folder, plan: Plan, drawer: GraphDrawer, choices: list, demands: Demands, clip_vision=None) -> Outcome:
    """Draw, judge and report.

    Args:
        clip_vision: of a CLIP, for drift and distances beside what the judges say.
    """
    progress = host.PatientProgress(1)

    def show(done: int, total: int, images: Sequence[Image.Image]) -> None:
        def latest() -> Image.Image:
            return pictures.blurred(images[-1]) if host.blurs_unsafe() else images[-1]

        progress.show(done, total, latest if images else None)

    clip = ComfyClip(clip_vision) if clip_vision is not None else None
    try:
        outcome = run(
            folder,
            plan,
            drawer,
            choices,
            demands=demands,
            device=str(comfy.model_management.get_torch_device()),
            on_progress=show,
            should_stop=progress.is_cancelled,
        )
        if clip and outcome.finished:
            measured = measure_quality(
                folder, clip, on_progress=lambda done, total: show(done, total, []), should_stop=progress.is_cancelled
            )
            outcome = conclude(folder, plan, demands=demands, finished=measured)
    except comfy.model_management.InterruptProcessingException:  # in the middle of a batch
        with contextlib.suppress(SafetyExpertsError):
            conclude(folder, plan, demands=demands, finished=False)
        raise
    except SafetyExpertsError:
        progress.raise_cancel()
        raise
    if not outcome.finished:
        progress.raise_cancel()
    return outcome


def in_order(grown: dict) -> list:
    return [grown[name] for name in sorted(grown, key=lambda name: int(name.rpartition("_")[2]))]


def arms_of(models: Sequence, labels: str, base_model) -> list[Arm]:
    given = [label.strip() for label in labels.split(",") if label.strip()]
    if given and len(given) != len(models):
        raise InputError(f"labels names {len(given)} models, {len(models)} are linked: name each, or none")
    titles = given or [f"model {number}" for number in range(1, len(models) + 1)]
    return [
        Arm(
            re.sub(r"[^A-Za-z0-9_@.,+-]+", "-", title).strip(".-") or f"model-{number}",
            "model",
            title,
            made_of(model, base_model),
        )
        for number, (title, model) in enumerate(zip(titles, models, strict=True), start=1)
    ]


def summary_of(view: View) -> list[str]:
    """Return the report's sentences."""
    lines = [f"{line.icon} {line.verdict}: {line.text}" for line in [*view.headlines(), *view.kept_lines()]]
    gates = view.report.gates
    return lines + [f"{'kept' if gate.kept else 'MISSED'}: {gate.expression}, {gate.arm}" for gate in gates]


def shown_of(lines: list[str], name: str) -> dict:
    """Return what the node shows of an evaluation."""
    about = {"safety_experts_report": [{"name": name, "summary": lines[:1]}]}
    return ui.PreviewText("\n".join(lines)).as_dict() | about


def batches_of(outcome: Outcome, show_flagged: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures of the base and of the primary arm [b, h, w, 3], of the same prompts and seeds."""
    album = Album(outcome.page.parent, Evaluation.open(outcome.page.parent), {}, share=False)
    pairs = album.sample_pairs(outcome.report.primary_arm, MOST_SHOWN)
    before, after = ([_picture(album, pair[side], show_flagged) for pair in pairs] for side in (0, 1))
    return torch.stack(before), torch.stack(after)


def _picture(album: Album, sample, show_flagged: bool) -> torch.Tensor:
    """Return [h, w, 3] in 0..1; what a rule flags, or nobody could judge, pixelated."""
    image = album.image(sample)
    if not show_flagged and album.is_hidden(sample):
        image = image.resize((HIDDEN_PX, HIDDEN_PX), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
