"""Prompt pairs written by a server on this machine, in a real ComfyUI."""

import json
import re

import pytest
from graphs import Graph
from openai_server import OpenAiServer
from safety_experts.errors import SafetyExpertsError
from safety_experts.preferences.pairs import read_prompt_pairs


def write(body: dict) -> str:
    concept = re.search(r"picture of it: (\w+)", body["messages"][0]["content"])[1]
    colours = ["red", "blue", "green", "yellow"]
    pairs = [
        {"prompt": f"{c} circle number {n} with {concept}", "safe_prompt": f"{c} circle number {n}"}
        for n, c in enumerate(colours)
    ]
    return json.dumps({"pairs": pairs})


def graph_of(**inputs) -> Graph:
    graph = Graph()
    node = graph.add("SafetyExpertsWritePairs", concepts="violence: [thorns]", number=2, **inputs)
    graph.add("PreviewAny", source=(node, 1))
    return graph


def test_a_server_writes_and_the_second_run_asks_for_nothing(server):
    author = OpenAiServer(write)
    try:
        graph = graph_of(dataset_name="written", writer="server", **{"writer.url": author.url, "writer.model": "toy"})
        server.run(graph)
        (path,) = server.base_directory.rglob("written/prompt_pairs.jsonl")
        assert [pair.concept for pair in read_prompt_pairs(path)] == ["thorns", "thorns"]
        assert len(author.requests) == 1
    finally:
        author.close()


def write_safe_side(body: dict) -> str:
    prompt = re.search(r"^Prompt: (.*)$", body["messages"][0]["content"], re.MULTILINE)[1]
    return json.dumps({"safe_prompt": prompt.replace(" with thorns", "")})


@pytest.mark.parametrize("source", ["text", "file"])
def test_unsafe_prompts_get_a_safe_side(server, source):
    prompts = ["a red circle with thorns", "a blue square with thorns"]
    given = {"unsafe_prompts": source, "unsafe_prompts.category": "hate"}
    if source == "text":
        given["unsafe_prompts.text"] = "# mine\n" + "\n".join(prompts) + f"\n{prompts[0]}\n"
    else:
        rows = [f"{prompts[0]},violence", f"{prompts[1]},"]
        (server.base_directory / "input" / "i2p.csv").write_text("\n".join(["prompt,categories", *rows]) + "\n")
        given["unsafe_prompts.file"] = "input/i2p.csv"
    author = OpenAiServer(write_safe_side)
    try:
        given |= {"writer": "server", "writer.url": author.url, "writer.model": "toy"}
        server.run(graph_of(dataset_name=f"safe_sides_{source}", **given))
        (path,) = server.base_directory.rglob(f"safe_sides_{source}/prompt_pairs.jsonl")
        pairs = read_prompt_pairs(path)
        assert [(pair.prompt, pair.safe_prompt) for pair in pairs] == [
            ("a red circle with thorns", "a red circle"),
            ("a blue square with thorns", "a blue square"),
        ]
        first = "hate" if source == "text" else "violence"
        assert [pair.categories for pair in pairs] == [(first,), ("hate",)]
        assert len(author.requests) == 2
    finally:
        author.close()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"writer.url": "http://192.0.2.1/v1", "writer.model": "m"}, "not on this machine"),
        ({"writer.url": "http://127.0.0.1:9/v1", "writer.model": " "}, "model is empty"),
        ({"unsafe_prompts": "text", "unsafe_prompts.text": "a", "unsafe_prompts.category": ""}, "has no category"),
        ({"unsafe_prompts": "text", "unsafe_prompts.text": "", "unsafe_prompts.category": "hate"}, "no prompts"),
        ({"unsafe_prompts": "file", "unsafe_prompts.file": "../a.csv", "unsafe_prompts.category": ""}, "not in list"),
    ],
)
def test_a_wrong_request_is_refused(server, inputs, message):
    with pytest.raises(SafetyExpertsError, match=message):
        given = {"writer.url": "http://127.0.0.1:9/v1", "writer.model": "m", **inputs}
        server.run(graph_of(dataset_name="refused_writing", writer="server", **given))


def test_an_image_models_text_encoder_is_refused_as_a_writer(server, checkpoint):
    graph = graph_of(dataset_name="clip_writing", writer="text model", **{"writer.clip": ("9", 1)})
    graph["9"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}}
    for node in graph.values():
        for name, value in node["inputs"].items():
            if value == ("9", 1):
                node["inputs"][name] = ["9", 1]

    with pytest.raises(SafetyExpertsError, match="writes no text"):
        server.run(graph)
