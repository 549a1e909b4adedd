"""Before and after on a model that ComfyUI loads, by its Evaluate Safety."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..demo.comfyui import ComfyServer
from ..errors import InputError
from ..evaluation.judges import JudgeChoice
from ..preferences.prompt_pair import PromptPair
from .building import Sampling, add_prompt_pairs
from .graphs import Graph, Link, ModelFiles, add_experts, add_loaders
from .session import Comfy, run_graph, tidied, tidy, work_folder

_JUDGES_FOLDER = "safety_judges"  # nodes/host/judges.py
_WITH_CLIP = ("q16", "clip-concepts")

Arm = tuple[str, Sequence[tuple[Path, float]]]  # title, experts with their strengths


def evaluate_in_comfyui(
    comfy: Comfy,
    files: ModelFiles,
    arms: Sequence[Arm],
    pairs: Sequence[PromptPair],
    judges: Sequence[JudgeChoice],
    out: Path,
    sampling: Sampling,
    *,
    preset: str,
    images_per_prompt: int = 1,
    other_seeds: bool = True,
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
        for number, (_, experts) in enumerate(arms):
            grown[f"models__model_{number}"] = add_experts(graph, server, links.model, experts)
        for number, judge in enumerate(judges):
            grown[f"judges__judge_{number}"] = _add_judge(graph, server, judge)
        return graph, graph.add(
            "SafetyExpertsEvaluate",
            base_model=links.model,
            clip=links.clip,
            vae=links.vae,
            prompt_pairs=(add_prompt_pairs(graph, server, pairs), 0),
            labels=", ".join(title.replace(",", " ") for title, _ in arms),
            evaluation_name=out.name,
            preset=preset,
            images_per_prompt=images_per_prompt,
            other_seeds=other_seeds,
            gates="",
            show_flagged=False,
            **grown,
            **sampling.inputs(),
        )

    with tidied(work):
        finished = run_graph(comfy, work, build, {"evaluation": out.absolute()})
    return finished


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
