"""Before and after on a model that ComfyUI loads, by its Evaluate Safety."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..demo.comfyui import ComfyServer
from ..errors import InputError
from ..evaluation.judges import JudgeChoice
from ..preferences.categories import CATEGORIES
from ..preferences.prompt_pair import PromptPair
from .building import Sampling, add_prompt_pairs
from .graphs import Graph, Link, Links, ModelFiles, add_experts, add_loaders
from .session import Comfy, run_graph, tidied, tidy, work_folder

_JUDGES_FOLDER = "safety_judges"  # nodes/host/judges.py
_WITH_CLIP = ("q16", "clip-concepts")


@dataclass(frozen=True)
class HeadlessArm:
    """What is put onto the model: experts with their strengths, and the concepts of a Pair Guard."""

    title: str
    experts: Sequence[tuple[Path, float]]
    guard_lines: str = field(default="", repr=False)


def evaluate_in_comfyui(
    comfy: Comfy,
    files: ModelFiles,
    arms: Sequence[HeadlessArm],
    pairs: Sequence[PromptPair],
    judges: Sequence[JudgeChoice],
    out: Path,
    sampling: Sampling,
    *,
    preset: str,
    images_per_prompt: int = 1,
    other_seeds: bool = True,
    negative: str = "",
    with_twins: bool = False,
) -> bool:
    """Draw and judge into `out`, from which `report_again` reports; return False where it was stopped.

    Raises:
        InputError: an input is refused, in the node's own words.
        SafetyExpertsError: the work failed; what was judged is kept.
    """
    if unusable := next((judge.kind_name for judge in judges if judge.kind_name in _WITH_CLIP), None):
        raise InputError(f"--judge {unusable} needs a CLIP Vision loader: use it in the graph")
    work = work_folder(out)
    tidy(work, keep_log=False)

    def build(server: ComfyServer) -> tuple[Graph, str]:
        graph = Graph()
        links = add_loaders(graph, server, files)
        grown: dict[str, object] = {}
        for number, arm in enumerate(arms):
            model = add_experts(graph, server, links.model, arm.experts)
            grown[f"models__model_{number}"] = add_guard(graph, links, model, arm.guard_lines)
        for number, judge in enumerate(judges):
            grown[f"judges__judge_{number}"] = _add_judge(graph, server, judge)
        return graph, graph.add(
            "SafetyExpertsEvaluate",
            base_model=links.model,
            clip=links.clip,
            vae=links.vae,
            prompt_pairs=(add_prompt_pairs(graph, server, pairs), 0),
            labels=", ".join(arm.title.replace(",", " ") for arm in arms),
            evaluation_name=out.name,
            preset=preset,
            images_per_prompt=images_per_prompt,
            other_seeds=other_seeds,
            gates="",
            show_flagged=False,
            negative_arm=negative,
            safe_prompt_arm=with_twins,
            **grown,
            **sampling.inputs(),
        )

    with tidied(work):
        finished = run_graph(comfy, work, build, {"evaluation": out.absolute()})
    return finished


def add_guard(graph: Graph, links: Links, model: Link, lines: str) -> Link:
    """Put a Pair Guard onto a MODEL, where there are lines for it; return the link to what comes out."""
    if not lines:
        return model
    strengths = {name.replace("-", "_"): 1.0 for name in (*CATEGORIES, "other")}
    guard = graph.add(
        "SafetyExpertsPairGuard", model=model, clip=links.clip, concepts=lines, method="pair", opens="presence",
        **strengths,
    )  # fmt: skip
    return guard, 0


def _add_judge(graph: Graph, server: ComfyServer, judge: JudgeChoice) -> Link:
    inputs: dict[str, object] = {"judge": judge.kind_name, "name": judge.name, "judge__rule": judge.rule}
    for name, value in judge.options:
        if isinstance(value, Path):
            value = _hand_over(server, value)
        elif isinstance(value, dict):
            value = json.dumps(value)
        if value is not None and name not in ("allow_remote", "cache"):
            inputs[f"judge__{name}"] = value
    return graph.add("SafetyExpertsJudge", **inputs), 0


def _hand_over(server: ComfyServer, path: Path) -> str:
    """Put a judge's file or folder where its node finds it."""
    target = server.base_directory / "models" / _JUDGES_FOLDER / path.name

    def link(source: str, copy: str) -> None:
        try:
            os.link(Path(source).resolve(), copy)
        except OSError:  # another file system
            shutil.copyfile(source, copy)

    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, copy_function=link)
    else:
        link(str(path), str(target))
    return path.name
