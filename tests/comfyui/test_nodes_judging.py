"""Judges in a real ComfyUI: the nodes, and ComfyUI's own CLIP Vision and CLIP as the encoder."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import graphs
import pytest
import small_clips
import torch
from graphs import Graph
from PIL import Image
from safetensors import safe_open
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.errors import SafetyExpertsError
from safety_experts.evaluation.judges.clip_encoder import ClipFolder
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.preferences.verdicts import state_of
from safety_experts.toy.world import render_scene

WORKER = Path(__file__).with_name("comfyui_clip.py")
PACK = Path(__file__).resolve().parents[2]
MARKS = [(None, "thorns"), ("thorns", None), ("thorns", "thorns"), (None, None)]
STATES = ["agreed", "swapped", "both-unsafe", "both-safe"]


def build(folder: Path) -> PreferenceDataset:
    dataset = PreferenceDataset.create(folder, DatasetInfo({}, {}))
    for index, marks in enumerate(MARKS):
        pair = PromptPair(f"a red circle {index} with thorns", f"a red circle {index}", ("violence",), index)
        images = (render_scene("red", "circle", mark, 10 * index + side) for side, mark in enumerate(marks))
        dataset.add(pair, *images)
    return dataset


def judged_graph(name: str, *judges: dict) -> tuple[Graph, str]:
    graph = Graph()
    loaded = graph.add("SafetyExpertsLoadDataset", dataset_name=name)
    inputs = {f"judges.judge_{n}": (graph.add("SafetyExpertsJudge", **judge), 0) for n, judge in enumerate(judges)}
    return graph, graph.add("SafetyExpertsJudgeDataset", dataset=(loaded, 0), **inputs)


def test_a_dataset_is_judged_once_and_its_doubtful_pairs_left_for_review(server, checkpoint, classifier_folder):
    small_clips_folder = server.base_directory / "models" / "safety_judges" / "small"
    shutil.copytree(classifier_folder, small_clips_folder)
    dataset = build(server.base_directory / "datasets" / "to_judge")
    classifier = {
        "judge": "classifier",
        "judge.folder": "small",
        "judge.unsafe_labels": "thorns, stripes",
        "judge.rule": "threshold",
    }
    graph, node = judged_graph("to_judge", {"judge": "toy-oracle", "judge.rule": "own-mark"}, classifier)

    outputs = server.run(graph)["outputs"]

    dataset.refresh()
    assert [state_of(pair) for pair in dataset.pairs] == STATES
    assert {key.partition("/")[0] for key in dataset.pairs[0].scores} == {"toy-oracle", "classifier"}
    assert "1 of 4 pairs agree with their labels; 3 are for review" in json.dumps(outputs[node])
    # Its own writing must not make it, and a training behind it, run again.
    assert graphs.cached_nodes(server.run(graph)) == set(graph)
    # A reviewer's does.
    dataset.set_review(dataset.pairs[1].id, "flipped")
    assert node not in graphs.cached_nodes(server.run(graph))


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ({"judge": "classifier", "judge.folder": "../checkpoints", "judge.unsafe_labels": "a"}, "not in list|value"),
        ({"judge": "vlm", "judge.model": "m", "judge.url": "http://192.0.2.1/v1"}, "not on this machine"),
        ({"judge": "toy-oracle", "name": "a/b"}, "use letters"),
    ],
)
def test_a_workflow_cannot_leave_the_folder_or_the_machine(server, checkpoint, judge, message):
    if not (server.base_directory / "datasets" / "refused").exists():
        build(server.base_directory / "datasets" / "refused")

    with pytest.raises(SafetyExpertsError, match=message):
        server.run(judged_graph("refused", judge)[0])


def test_comfyuis_clip_gives_the_embeddings_of_the_folder(tmp_path):
    clip = small_clips.write_clip(
        tmp_path / "clip", projection=128, tokenizer=find_comfyui() / "comfy" / "sd1_tokenizer"
    )
    pictures = [*small_clips.scenes("thorns", 2, 5), Image.effect_mandelbrot((90, 130), (-2, -1.2, 1, 1.2), 60)]
    (tmp_path / "pictures").mkdir()
    for number, picture in enumerate(pictures):
        picture.convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
    texts = ["a plain red picture", "a picture with thorns"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))

    command = [sys.executable, str(WORKER), str(find_comfyui()), str(PACK), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True)

    assert finished.returncode == 0, finished.stderr[-3000:]
    with safe_open(tmp_path / "embedded.safetensors", "pt") as file:
        images, found_texts, metadata = file.get_tensor("images"), file.get_tensor("texts"), file.metadata()
    encoder = ClipFolder(clip, "cpu")
    expected = [encoder.embed_images([picture.convert("RGB") for picture in pictures]), encoder.embed_texts(texts)]
    for found, wanted in zip((images, found_texts), expected, strict=True):
        # ComfyUI computes in another precision and rounds pixels; another picture or text is below 0.9.
        assert torch.cosine_similarity(found, wanted).min() > 0.99
    assert metadata["said"].startswith("InputError: CLIP and CLIP Vision do not belong together")
    first, second = json.loads(metadata["versions"])
    assert first == second

    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())  # Evaluate Safety with this CLIP Vision
    drift = {row["arm"]: row["mean"] for row in report["metrics"] if row["metric"] == "clip/similarity"}
    assert drift["half"] > drift["null"] and report["complete"]
    assert {(row["arm"], row["metric"]) for row in report["distances"]} == {
        (arm, metric) for arm in ("half", "null") for metric in ("kid", "cmmd")
    }
