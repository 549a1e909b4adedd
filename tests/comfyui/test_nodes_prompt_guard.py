"""Train Prompt Guard and Check Prompt in a real ComfyUI, on the toy checkpoint's CLIP, which was never trained.

It tells words apart and knows no meaning: a synonym passes by construction, and nothing here says otherwise.
"""

import json

import graphs
import numpy as np
import pytest
from graphs import Graph
from safety_experts.errors import SafetyExpertsError

SEED = 5
UNSAFE, SAFE = "a red circle with thorns", "a red circle"
PAIRS = "\n".join(
    f"a {colour} {shape} with thorns | a {colour} {shape}"
    for colour in ("blue", "green", "pink", "cyan", "yellow")
    for shape in ("circle", "square")
)
FOUND = {"text": 0, "safe": 2, "category": 3, "score": 4, "report": 5}


@pytest.fixture(scope="module")
def trained(server, checkpoint) -> tuple[str, str]:
    """(the guard's file, the report): trained on ten scenes, none of them red."""
    graph = Graph()
    guard = graph.add(
        "SafetyExpertsTrainPromptGuard",
        clip=(graphs.checkpoint_loader(graph, checkpoint), 1),
        prompt_pairs=(graphs.add_pairs(graph, PAIRS), 0),
        name="toy",
        false_positive_rate=0.0,
        steps=12,
        seed=0,
        leave_out=False,
    )
    shown = [graph.add("PreviewAny", source=(guard, slot)) for slot in (1, 2)]
    outputs = server.run(graph)["outputs"]
    report, file = (outputs[node]["text"][0] for node in shown)
    return file, report


def add_check(graph: Graph, checkpoint: str, guard_file: str, text: str, **inputs) -> str:
    loader = graphs.checkpoint_loader(graph, checkpoint)
    settings = {"action": "report", "file": guard_file, "encoder": (loader, 1), **inputs}
    return graph.add("SafetyExpertsCheckPrompt", clip=(loader, 1), text=text, **settings)


def said(server, checkpoint, file, text, **inputs) -> dict:
    graph = Graph()
    check = add_check(graph, checkpoint, file, text, **inputs)
    shown = {name: graph.add("PreviewAny", source=(check, slot)) for name, slot in FOUND.items()}
    outputs = server.run(graph)["outputs"]
    return {name: outputs[node]["text"][0] for name, node in shown.items()}


def drawn(server, checkpoint, graph: Graph, positive, model=None, cfg=3.0) -> np.ndarray:
    loader = graphs.checkpoint_loader(graph, checkpoint)
    sampled = graph.add(
        "KSampler",
        model=model or (loader, 0),
        positive=positive,
        negative=(graph.add("CLIPTextEncode", clip=(loader, 1), text=""), 0),
        latent_image=(graph.add("EmptyLatentImage", width=64, height=64, batch_size=1), 0),
        seed=SEED,
        denoise=1.0,
        **{**graphs.SAMPLING, "cfg": cfg},
    )
    decoded = graph.add("VAEDecode", samples=(sampled, 0), vae=(loader, 2))
    return graphs.draw(server, graph, graph.add("SaveImage", images=(decoded, 0), filename_prefix="test"))


def encoded(graph: Graph, checkpoint: str, text: str) -> tuple[str, int]:
    return graph.add("CLIPTextEncode", clip=(graphs.checkpoint_loader(graph, checkpoint), 1), text=text), 0


def drawn_checked(server, checkpoint, guard_file, text, **inputs) -> np.ndarray:
    graph = Graph()
    return drawn(server, checkpoint, graph, (add_check(graph, checkpoint, guard_file, text, **inputs), 1))


def drawn_plainly(server, checkpoint, text) -> np.ndarray:
    graph = Graph()
    return drawn(server, checkpoint, graph, encoded(graph, checkpoint, text))


def test_the_report_is_of_scenes_held_out(trained):
    assert trained[0] == "toy_00001_.safetensors"
    assert trained[1].startswith("violence: opens on 100% of 2 unsafe prompts held out, and on 0% of 0 of other")
    assert "0.0% of 2 safe prompts held out are taken for unsafe" in trained[1]


def test_a_prompt_of_a_scene_never_seen_is_reported_and_left_as_it_is(server, checkpoint, trained):
    unsafe, safe = (said(server, checkpoint, trained[0], text) for text in (UNSAFE, SAFE))

    assert (unsafe["text"], unsafe["safe"], unsafe["category"]) == (UNSAFE, "False", "violence")
    assert float(unsafe["score"]) > 0 > float(safe["score"])
    assert (safe["text"], safe["safe"], safe["category"]) == (SAFE, "True", "")
    assert unsafe["report"].startswith("asks for violence; as it is\nviolence: +")
    assert safe["report"].startswith("safe\nviolence: -")


def test_an_emphasis_does_not_play_a_word_down(server, checkpoint, trained):
    assert said(server, checkpoint, trained[0], "a red circle with (thorns:0.05)")["safe"] == "False"


def test_a_synonym_passes_by_construction_as_this_clip_knows_no_meaning(server, checkpoint, trained):
    found = said(server, checkpoint, trained[0], "a red circle with spikes")

    assert float(found["score"]) < float(said(server, checkpoint, trained[0], UNSAFE)["score"])


def test_block_draws_nothing_says_why_and_does_not_quote_the_prompt(server, checkpoint, trained):
    graph, events = Graph(), []
    check = add_check(graph, checkpoint, trained[0], UNSAFE, action="block")
    encoded = graph.add("CLIPTextEncode", clip=(graphs.checkpoint_loader(graph, checkpoint), 1), text=(check, 0))
    shown = graph.add("PreviewAny", source=(encoded, 0))
    safe = graph.add("PreviewAny", source=(check, 2))
    outputs = server.run(graph, on_event=lambda kind, data: events.append((kind, data)))["outputs"]

    assert outputs[safe]["text"][0] == "False"
    assert shown not in outputs
    (error,) = [data for kind, data in events if kind == "execution_error"]
    assert "asks for violence" in error["exception_message"]
    assert "thorns" not in json.dumps(error)


def test_a_safe_prompt_is_not_blocked(server, checkpoint, trained):
    image = drawn_checked(server, checkpoint, trained[0], SAFE, action="block")

    np.testing.assert_array_equal(image, drawn_plainly(server, checkpoint, SAFE))


def test_replace_draws_the_other_prompt(server, checkpoint, trained):
    image = drawn_checked(server, checkpoint, trained[0], UNSAFE, action="replace", instead=SAFE)

    np.testing.assert_array_equal(image, drawn_plainly(server, checkpoint, SAFE))


def test_soften_is_comfyuis_own_mean_of_two_conditionings(server, checkpoint, trained):
    image = drawn_checked(server, checkpoint, trained[0], UNSAFE, action="soften", instead=SAFE, amount=0.25)

    graph = Graph()
    parts = [
        graph.add("ConditioningSetAreaStrength", conditioning=encoded(graph, checkpoint, text), strength=strength)
        for text, strength in ((UNSAFE, 0.75), (SAFE, 0.25))
    ]
    both = graph.add("ConditioningCombine", conditioning_1=(parts[0], 0), conditioning_2=(parts[1], 0)), 0
    np.testing.assert_array_equal(image, drawn(server, checkpoint, graph, both))
    assert np.abs(image - drawn_plainly(server, checkpoint, UNSAFE)).max() > 5


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"action": "replace"}, "replace needs a safe prompt"),
        ({"action": "replace", "instead": "a pink square with thorns"}, "taken for unsafe too"),
        ({"action": "rewrite"}, "rewrite needs a language model"),
        ({"file": "(the connected one)"}, "no prompt guard"),
    ],
)
def test_what_cannot_be_done_is_refused(server, checkpoint, trained, inputs, message):
    with pytest.raises(SafetyExpertsError, match=message):
        drawn_checked(server, checkpoint, trained[0], UNSAFE, **inputs)


def test_a_text_encoder_that_cannot_write_is_refused(server, checkpoint, trained):
    graph = Graph()
    loader = graphs.checkpoint_loader(graph, checkpoint)
    check = add_check(graph, checkpoint, trained[0], UNSAFE, action="rewrite", language_model=(loader, 1))
    with pytest.raises(SafetyExpertsError, match="cannot write"):
        drawn(server, checkpoint, graph, (check, 1))


@pytest.mark.parametrize(("prompt", "acts"), [(UNSAFE, True), (SAFE, False)])
def test_one_decision_drives_the_guard_on_the_model(server, checkpoint, trained, prompt, acts):
    """Opened by Check Prompt's gate it is the guard that always acts; closed it is the base picture, to the bit."""
    images = {}
    for opens in ("gate", "always"):
        graph = Graph()
        loader = graphs.checkpoint_loader(graph, checkpoint)
        check = add_check(graph, checkpoint, trained[0], prompt)
        model = graph.add(
            "SafetyExpertsPairGuard",
            model=(loader, 0),
            clip=(loader, 1),
            concepts="violence: a shape with thorns | a shape",
            method="pair",
            opens=opens,
            gate=(check, 6),
            **graphs.STRENGTHS,
        )
        images[opens] = drawn(server, checkpoint, graph, (check, 1), model=(model, 0))

    expected = images["always"] if acts else drawn_plainly(server, checkpoint, prompt)
    np.testing.assert_array_equal(images["gate"], expected)


@pytest.mark.parametrize(("prompt", "acts"), [(UNSAFE, True), (SAFE, False)])
def test_the_same_decision_drives_an_expert(server, checkpoint, trained, attention_shapes, prompt, acts):
    folder = server.base_directory / "output" / "loras"
    graphs.save_random_expert(folder / "checked.safetensors", 13, 3, 4.0, ["violence"], attention_shapes)
    images = {}
    for gated in (True, False):
        graph = Graph()
        check = add_check(graph, checkpoint, trained[0], prompt)
        gate = {"gate": (check, 6)} if gated else {}
        expert = graphs.add_expert(graph, "checked")
        model = graphs.add_apply(graph, checkpoint, expert, **gate), 0
        images[gated] = drawn(server, checkpoint, graph, (check, 1), model=model)

    base = drawn_plainly(server, checkpoint, prompt)
    assert np.abs(images[False] - base).max() > 20
    if acts:  # beside the weights a low-rank change rounds differently than in them
        np.testing.assert_allclose(images[True], images[False], atol=2)
    else:
        np.testing.assert_array_equal(images[True], base)


def test_a_concept_gate_can_check_prompts_too(server, checkpoint, trained):
    graph = Graph()
    loader = graphs.checkpoint_loader(graph, checkpoint)
    settings = {"false_positive_rate": 0.0, "num_pairs": 4}
    gate = graph.add(
        "SafetyExpertsConceptGate", clip=(loader, 1), prompt_pairs=(graphs.add_pairs(graph, PAIRS), 0), **settings
    )
    check = graph.add(
        "SafetyExpertsCheckPrompt",
        clip=(loader, 1),
        text=UNSAFE,
        action="report",
        file="(the connected one)",
        guard=(gate, 0),
    )
    shown = graph.add("PreviewAny", source=(check, 3))

    assert server.run(graph)["outputs"][shown]["text"][0] == "violence"


def test_the_file_says_what_it_is_of(server, trained):
    from safetensors import safe_open

    with safe_open(server.base_directory / "models" / "safety_judges" / trained[0], "pt") as file:
        facts = json.loads(file.metadata()["safety_experts_prompt_guard"])
    assert facts["concepts"] == [{"text": "with thorns", "categories": ["violence"]}]
    assert facts["categories"]["violence"]["recall"] == 1.0
    assert facts["threshold"] < 1
