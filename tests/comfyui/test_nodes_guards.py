"""The node Pair Guard in workflows: what it says, what it refuses, and that every stock sampler node gets it."""

import graphs
import numpy as np
import pytest
from graphs import Graph
from safety_experts.errors import SafetyExpertsError

SEED = 5
PROMPT = "a red circle with thorns"
CONCEPTS = "violence: a shape with thorns | a shape\nbugs: a shape with wings"


def add_guard(graph: Graph, checkpoint: str, model=None, **inputs) -> tuple[str, int]:
    loader = graphs.checkpoint_loader(graph, checkpoint)
    settings = {"concepts": CONCEPTS, "method": "pair", "opens": "presence", **graphs.STRENGTHS, **inputs}
    return graph.add("SafetyExpertsPairGuard", model=model or (loader, 0), clip=(loader, 1), **settings), 0


def report(server, graph: Graph, guard: tuple[str, int]) -> str:
    shown = graph.add("PreviewAny", source=(guard[0], 1))
    return server.run(graph)["outputs"][shown]["text"][0]


def draw(server, checkpoint: str, graph: Graph, model=None, **sampling) -> np.ndarray:
    return graphs.draw(server, graph, graphs.add_image(graph, checkpoint, PROMPT, SEED, model=model, **sampling))


def draw_custom(server, checkpoint: str, graph: Graph, model) -> np.ndarray:
    """The same picture by SamplerCustomAdvanced with CFGGuider."""
    loader = graphs.checkpoint_loader(graph, checkpoint)
    positive, negative = (
        (graph.add("CLIPTextEncode", clip=(loader, 1), text=text), 0) for text in (PROMPT, "")
    )  # fmt: skip
    guider = graph.add("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0), 0
    sigmas = graph.add("BasicScheduler", model=model, scheduler="normal", steps=4, denoise=1.0), 0
    sampled = graph.add(
        "SamplerCustomAdvanced",
        noise=(graph.add("RandomNoise", noise_seed=SEED), 0),
        guider=guider,
        sampler=(graph.add("KSamplerSelect", sampler_name="euler"), 0),
        sigmas=sigmas,
        latent_image=(graph.add("EmptyLatentImage", width=64, height=64, batch_size=1), 0),
    )
    decoded = graph.add("VAEDecode", samples=(sampled, 0), vae=(loader, 2))
    return graphs.draw(server, graph, graph.add("SaveImage", images=(decoded, 0), filename_prefix="test"))


def test_the_report_says_what_is_guarded_against_and_what_it_costs(server, checkpoint):
    graph = Graph()
    pairs = graphs.add_pairs(graph, "a with thorns | a\nb with thorns | b", category="hate")
    text = report(server, graph, add_guard(graph, checkpoint, pairs=(pairs, 0)))

    assert text == (
        "violence: two texts\nbugs: two texts\nhate: the means of 2 prompt pairs\n"
        "pair, opened by presence: 6 predictions more in the first 33% of the steps, then two while open and none "
        "while closed"
    )


def test_both_sampler_nodes_draw_the_same_guarded_picture(server, checkpoint):
    graph, custom = Graph(), Graph()
    image = draw(server, checkpoint, graph, add_guard(graph, checkpoint))

    np.testing.assert_array_equal(draw_custom(server, checkpoint, custom, add_guard(custom, checkpoint)), image)
    assert np.abs(image - draw(server, checkpoint, Graph())).max() > 20


def test_a_category_at_strength_0_is_the_base_picture_to_the_bit(server, checkpoint):
    graph = Graph()
    image = draw(server, checkpoint, graph, add_guard(graph, checkpoint, violence=0.0, other=0.0))

    np.testing.assert_array_equal(image, draw(server, checkpoint, Graph()))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concepts": ""}, "nothing to guard against"),
        ({"concepts": "violence: a | b\nthorns"}, "line 2: write a concept a line"),
        ({"concepts": "allowed: a | b"}, "nothing to guard against"),
        ({"concepts": "hate: a | b\nallowed: c | b", "method": "sld"}, "`allowed` lines are for the method pair"),
        ({"opens": "gate"}, "nothing is connected to gate"),
    ],
)
def test_what_cannot_guard_is_refused(server, checkpoint, inputs, message):
    graph = Graph()
    with pytest.raises(SafetyExpertsError, match=message):
        draw(server, checkpoint, graph, add_guard(graph, checkpoint, **inputs))


@pytest.mark.parametrize(("prompt", "acts"), [("a red circle with thorns", True), ("a red circle", False)])
def test_a_concept_gate_opens_it_by_the_prompt(server, checkpoint, prompt, acts):
    """The oracle is the same guard that always acts, and none."""
    images = {}
    for opens in ("gate", "always", None):
        graph = Graph()
        loader = graphs.checkpoint_loader(graph, checkpoint)
        text = "\n".join(f"a {colour} circle with thorns | a {colour} circle" for colour in ("blue", "green", "red"))
        pairs = (graphs.add_pairs(graph, text), 0)
        settings = {"false_positive_rate": 0.0, "num_pairs": 100}
        gate = graph.add("SafetyExpertsConceptGate", clip=(loader, 1), prompt_pairs=pairs, **settings), 0
        model = add_guard(graph, checkpoint, pairs=pairs, concepts="", gate=gate, opens=opens) if opens else None
        images[opens] = graphs.draw(server, graph, graphs.add_image(graph, checkpoint, prompt, SEED, model=model))

    np.testing.assert_array_equal(images["gate"], images["always" if acts else None])
    assert np.abs(images["always"] - images[None]).max() > 20


@pytest.mark.parametrize(
    ("prompt", "inputs", "said"),
    [
        (PROMPT, {}, "1 words carry a concept: thorns"),
        ("a red circle", {}, "the gate is closed; nothing was changed"),
        ("a red circle", {"version": "published", "gate": None}, "1 words carry a concept: "),
    ],
)
def test_safe_text_encode_names_the_words_and_only_published_finds_some_in_a_harmless_prompt(
    server, checkpoint, prompt, inputs, said
):
    """This text encoder was never trained: it tells words apart, so that mechanics are all that is shown."""
    graph = Graph()
    loader = graphs.checkpoint_loader(graph, checkpoint)
    text = "\n".join(f"a {colour} circle with thorns | a {colour} circle" for colour in ("blue", "green"))
    pairs = (graphs.add_pairs(graph, text), 0)
    gate = graph.add(
        "SafetyExpertsConceptGate", clip=(loader, 1), prompt_pairs=pairs, false_positive_rate=0.0, num_pairs=9
    )
    settings = {"concepts": "violence: thorns", "version": "repaired", "share": 0.5, "gate": (gate, 0), **inputs}
    settings = {name: value for name, value in settings.items() if value is not None}
    encoded = graph.add("SafetyExpertsSafeTextEncode", clip=(loader, 1), text=prompt, **settings)

    assert report(server, graph, (encoded, 0)).startswith(said)
