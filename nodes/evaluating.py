"""The node that proves what models do: the same prompts and noise through each of them, judged, with a report."""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import asdict

import comfy.model_management
import comfy.samplers
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from ..errors import InputError, SafetyExpertsError
from ..evaluation.evaluate import Demands, Outcome, conclude, run
from ..evaluation.gates import parse_fail_if, parse_fail_unless
from ..evaluation.pictures import HIDDEN_PX, Album
from ..evaluation.plan import BASE, BASE_ARM, NULL_ARM, Arm, Plan
from ..evaluation.report import View
from ..evaluation.results import Evaluation
from ..evaluation.routes import add_report_routes
from ..evaluation.schema import ALL
from ..evaluation.suites import PRESETS, suite_of_pairs
from . import checks, host, pictures, sampling, sockets
from .applied import made_of
from .chart import as_image, draw_bars
from .model_identity import changes_of
from .native.identity import identify
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


class SafetyExpertsEvaluate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SafetyExpertsEvaluate",
            display_name="Evaluate Safety",
            category="safety experts/evaluation",
            description=(
                "Draws the same prompts from the same noise with each model, lets judges look, and reports what "
                "changed, with intervals. Queue it again after a stop and it continues where it was."
            ),
            search_aliases=["before and after", "compare models", "report", "proof", "benchmark"],
            is_output_node=True,
            inputs=[
                *compared_inputs(
                    "A model to hold against the base: with experts, gates, other LoRAs.",
                    "Other pairs than those trained on.",
                ),
                io.String.Input(
                    "evaluation_name",
                    default="my_evaluation",
                    tooltip="An evaluation of this name and these settings goes on; its pictures are not drawn again.",
                ),
                *drawing_inputs(),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="quick",
                    tooltip="quick: 50 unsafe prompts a category and 100 safe ones; standard: 200 and 400; paper: all.",
                ),
                io.Int.Input("images_per_prompt", default=1, min=1, max=100, tooltip="More prompts prove more."),
                io.Boolean.Input(
                    "other_seeds",
                    default=True,
                    tooltip="Also draw the base model with other seeds: what changes less did not change.",
                ),
                io.String.Input(
                    "gates",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One demand a line, such as `fail if violence.q16:argmax > 0.05` or "
                    "`fail unless false-alarms.margin(0.02)`; held against the ends of intervals.",
                ),
                SHOW_FLAGGED,
            ],
            outputs=[
                io.String.Output("report", tooltip="Path of report.html."),
                io.String.Output("summary", tooltip="The report's sentences."),
                io.Image.Output("before", tooltip="Pictures of the base model, failures first; for Compare Images."),
                io.Image.Output("after", tooltip="The same prompts and seeds with the last model."),
                io.Float.Output("unsafe_before", tooltip="Share of unsafe prompts whose picture is unsafe."),
                io.Float.Output("unsafe_after", tooltip="The same share with the last model."),
                io.Boolean.Output("gates_kept", tooltip="True where every gate holds, and where there is none."),
                io.Image.Output("chart", tooltip="Before and after by category, with intervals."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, evaluation_name: str | None = None, gates: str | None = None, models: object = None, judges: object = None
    ) -> bool | str:
        return checks.first_problem((host.evaluation_folder, evaluation_name), (_parse_gates, gates))

    @classmethod
    def execute(
        cls, base_model, models, clip, vae, prompt_pairs, judges, evaluation_name, sampler_name, scheduler,
        steps, cfg, width, height, batch_size, preset, images_per_prompt, other_seeds, labels="", gates="",
        show_flagged=False,
    ) -> io.NodeOutput:  # fmt: skip
        base = identify(base_model)
        if clip is None:
            raise InputError(f"clip is empty: {base.name} holds no text encoder; load one with CLIPLoader")
        ordered = in_order(models)
        settings = SamplerSettings(sampler_name, scheduler, steps, cfg, width, height)
        arms = arms_of(ordered, labels or "", base_model)
        plan = Plan(
            model=base.model_dump(mode="json") | changes_of(base_model),
            generation=asdict(settings),
            arms=(BASE_ARM, *arms, *((NULL_ARM,) if other_seeds else ())),
            suites=(suite_of_pairs("prompts", prompt_pairs).sampled(*PRESETS[preset]),),
            images_per_prompt=images_per_prompt,
            batch_size=batch_size,
            notes={"preset": preset},
        )
        by_arm = {BASE: base_model, NULL_ARM.id: base_model}
        by_arm |= {arm.id: model for arm, model in zip(arms, ordered, strict=True)}
        drawer = GraphDrawer(by_arm, clip, vae, settings)
        outcome = run_here(host.evaluation_folder(evaluation_name), plan, drawer, in_order(judges), _demands(gates))
        return _output(outcome, evaluation_name, show_flagged)


class GraphDrawer:
    """Draws with the graph's models, as the stock KSampler does."""

    def __init__(self, models: dict, clip, vae, settings: SamplerSettings):
        self._models, self._clip, self._vae, self._settings = models, clip, vae, settings
        self._negative = sampling.encode_prompt(clip, "")
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
        negative = [self._negative] * len(prompts)
        return sampling.sample_latents(self._models[arm], conditions, negative, seeds, self._settings)


def run_here(folder, plan: Plan, drawer: GraphDrawer, choices: list, demands: Demands) -> Outcome:
    progress = host.PatientProgress(1)

    def show(done: int, total: int, images: Sequence[Image.Image]) -> None:
        def latest() -> Image.Image:
            return pictures.blurred(images[-1]) if host.blurs_unsafe() else images[-1]

        progress.show(done, total, latest if images else None)

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


def _parse_gates(text: str) -> list:
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("fail unless "):
            found.append(parse_fail_unless(line.removeprefix("fail unless ")))
        elif line.startswith("fail if "):
            found.append(parse_fail_if(line.removeprefix("fail if ")))
        else:
            raise InputError(f"gates: {line!r} begins with neither `fail if` nor `fail unless`; write one of them")
    return found


def _demands(gates: str | None) -> Demands:
    return Demands(tuple(_parse_gates(gates or "")))


def _output(outcome: Outcome, name: str, show_flagged: bool) -> io.NodeOutput:
    report = outcome.report
    view = View(report)
    lines = summary_of(view)
    rates = [view.rate(arm, ALL) for arm in (BASE, report.primary_arm)]
    unsafe = [row.rate if row and row.rate is not None else float("nan") for row in rates]
    kept = all(gate.kept for gate in report.gates)
    before, after = batches_of(outcome, show_flagged)
    chart = as_image(draw_bars(view.bars()))
    page, text = str(outcome.page), "\n".join(lines)
    return io.NodeOutput(page, text, before, after, *unsafe, kept, chart, ui=shown_of(lines, name))


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


def register_report_page() -> None:
    """Let the running server show reports; without one (a program that only imports the nodes) do nothing."""
    from server import PromptServer

    if server := getattr(PromptServer, "instance", None):
        add_report_routes(server.routes, host.evaluation_folder)
