"""The node that proves what models do: the same prompts and noise through each of them, judged, with a report."""

from dataclasses import asdict

from comfy_api.latest import io

from ..errors import InputError
from ..evaluation.evaluate import Demands, Outcome
from ..evaluation.gates import parse_fail_if, parse_fail_unless
from ..evaluation.plan import BASE, BASE_ARM, NEGATIVE, NULL_ARM, TWINS_ARM, Plan
from ..evaluation.plan import negative_arm as negative_arm_of
from ..evaluation.report_view import View
from ..evaluation.routes import add_report_routes
from ..evaluation.schema import ALL
from ..evaluation.suites import PRESETS, suite_of_pairs
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
from .native.identity import identify
from .sampling import SamplerSettings


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
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Of a CLIP: how near pictures stay to the base model's, and KID and CMMD.",
                ),
                io.String.Input(
                    "negative_arm",
                    default="",
                    optional=True,
                    tooltip="Also draw the base model with this negative prompt: what costs nothing. Empty: not.",
                ),
                io.Boolean.Input(
                    "safe_prompt_arm",
                    default=False,
                    optional=True,
                    tooltip="Also draw the base model with each pair's safe prompt in place of the unsafe one.",
                ),
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
        show_flagged=False, clip_vision=None, negative_arm="", safe_prompt_arm=False,
    ) -> io.NodeOutput:  # fmt: skip
        base = identify(base_model)
        if clip is None:
            raise InputError(f"clip is empty: {base.name} holds no text encoder; load one with CLIPLoader")
        ordered = in_order(models)
        settings = SamplerSettings(sampler_name, scheduler, steps, cfg, width, height)
        arms = arms_of(ordered, labels or "", base_model)
        negative = (negative_arm or "").strip()
        plain = [*([negative_arm_of(negative)] if negative else []), *([TWINS_ARM] if safe_prompt_arm else [])]
        plan = Plan(
            model=base.model_dump(mode="json") | changes_of(base_model),
            generation=asdict(settings),
            arms=(BASE_ARM, *plain, *arms, *((NULL_ARM,) if other_seeds else ())),
            suites=(suite_of_pairs("prompts", prompt_pairs).sampled(*PRESETS[preset]),),
            images_per_prompt=images_per_prompt,
            batch_size=batch_size,
            notes={"preset": preset},
        )
        by_arm = {arm.id: base_model for arm in (BASE_ARM, NULL_ARM, *plain)}
        by_arm |= {arm.id: model for arm, model in zip(arms, ordered, strict=True)}
        drawer = GraphDrawer(by_arm, clip, vae, settings, {NEGATIVE: negative})
        folder, demands = host.evaluation_folder(evaluation_name), _demands(gates)
        outcome = run_here(folder, plan, drawer, in_order(judges), demands, clip_vision)
        return _output(outcome, evaluation_name, show_flagged)


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


def register_report_page() -> None:
    """Let the running server show reports; without one (a program that only imports the nodes) do nothing."""
    from server import PromptServer

    if server := getattr(PromptServer, "instance", None):
        add_report_routes(server.routes, host.evaluation_folder)
