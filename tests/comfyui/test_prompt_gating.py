"""Categories that act only on the prompts that ask for them, against ComfyUI's own per-conditioning LoRA hooks."""

import re

import graphs
import numpy as np
import pytest
from graphs import Graph
from safety_experts.errors import SafetyExpertsError

SEED = 5
SAFE, HATE = "a red circle", "a red circle with stripes"
SELF_HARM = "a red circle with a very large cross and a ring"
TAXONOMY = """\
categories: {hate: [stripes], self-harm: [a very large cross and a ring]}
lists: {colour: [red, blue], shape: [circle, square]}
templates: [{prompt: "a {colour} {shape} with {concept}", safe_prompt: "a {colour} {shape}"}]
"""


@pytest.fixture(scope="module", autouse=True)
def experts(server, attention_shapes) -> None:
    folder = server.base_directory / "output" / "loras"
    text_encoder = {"lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768)}
    for name, seed, category, shapes in (
        ("gated_hate", 11, "hate", attention_shapes),
        ("gated_self_harm", 12, "self-harm", attention_shapes),
        ("gated_violence", 13, "violence", attention_shapes),
        ("gated_text", 14, "hate", attention_shapes | text_encoder),
    ):
        graphs.save_random_expert(folder / f"{name}.safetensors", seed, 3, 4.0, [category], shapes)


def add_gate(graph: Graph, checkpoint: str, taxonomy: str = TAXONOMY) -> str:
    loader = graphs.checkpoint_loader(graph, checkpoint)
    pairs = graph.add("SafetyExpertsPromptPairs", source="taxonomy", source__taxonomy=taxonomy, source__first_seed=0)
    settings = {"false_positive_rate": 0.0, "num_pairs": 100}
    return graph.add("SafetyExpertsConceptGate", clip=(loader, 1), prompt_pairs=(pairs, 0), **settings)


def add_gated(graph: Graph, checkpoint: str, *names: str, **inputs) -> tuple[str, int]:
    """Apply the sum of experts behind a gate; return a link to the model."""
    slots = {f"experts__expert_{index}": graphs.add_expert(graph, name) for index, name in enumerate(names)}
    merged = graph.add("SafetyExpertsMerge", method="linear", **slots), 0
    gate = add_gate(graph, checkpoint), 0
    return graphs.add_apply(graph, checkpoint, merged, gate=gate, **inputs), 0


def add_prompt(graph: Graph, checkpoint: str, prompt: str, **hooked: float) -> tuple[str, int]:
    """Encode a prompt; return a link to it, with stock LoRA hooks of these experts at these strengths."""
    condition = graph.add("CLIPTextEncode", clip=(graphs.checkpoint_loader(graph, checkpoint), 1), text=prompt), 0
    hooks: dict = {}
    for name, strength in hooked.items():
        settings = {"lora_name": f"{name}.safetensors", "strength_model": strength, "strength_clip": 0.0}
        hooks = {"prev_hooks": (graph.add("CreateHookLora", **settings, **hooks), 0)}
    if hooks:
        settings = {"strength": 1.0, "set_cond_area": "default", "hooks": hooks["prev_hooks"]}
        condition = graph.add("ConditioningSetProperties", cond_NEW=condition, **settings), 0
    return condition


def draw(server, checkpoint: str, graph: Graph, model=None, *, positive=None, prompt=SAFE, batch_size=1, **sampling):
    """Return the pixels of an image; `positive` is a link that replaces the prompt."""
    saved = graphs.add_image(graph, checkpoint, prompt, SEED, model=model, **sampling)
    sampler = next(node for node in graph.values() if node["class_type"] == "KSampler")
    if positive:
        sampler["inputs"]["positive"] = list(positive)
    graph[sampler["inputs"]["latent_image"][0]]["inputs"]["batch_size"] = batch_size
    return graphs.draw(server, graph, saved)


def assert_close(image, expected):
    """Low-rank terms added to outputs round otherwise than patched weights: at most one of 255 levels."""
    assert np.abs(image - expected).max() <= 1


def test_the_report_says_how_well_prompts_are_told_apart(server, checkpoint):
    graph = Graph()
    shown = graph.add("PreviewAny", source=(add_gate(graph, checkpoint), 1))
    text = server.run(graph)["outputs"][shown]["text"][0]

    common = "opens on 100% of 4 unsafe prompts and on 0.0% of 4 safe ones"
    assert re.fullmatch(
        rf"hate: {common}, 100% of 4 of other categories; threshold -\d\.\d+\n"
        rf"self-harm: {common}, 0% of 4 of other categories; threshold -\d\.\d+",
        text,
    ), text


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_on_a_safe_prompt_the_image_is_the_base_models_to_the_bit(server, checkpoint, cfg):
    graph = Graph()
    image = draw(server, checkpoint, graph, add_gated(graph, checkpoint, "gated_hate"), cfg=cfg)

    np.testing.assert_array_equal(image, draw(server, checkpoint, Graph(), cfg=cfg))


def test_on_an_unsafe_prompt_without_guidance_it_acts_as_without_a_gate(server, checkpoint):
    graph = Graph()
    image = draw(server, checkpoint, graph, add_gated(graph, checkpoint, "gated_hate"), prompt=HATE, cfg=1.0)

    stock = Graph()
    model = graphs.add_stock_loader(stock, checkpoint, "gated_hate"), 0
    assert_close(image, draw(server, checkpoint, stock, model, prompt=HATE, cfg=1.0))
    assert np.abs(image - draw(server, checkpoint, Graph(), prompt=HATE, cfg=1.0)).max() > 20


def test_only_the_unsafe_rows_of_a_guided_batch_are_changed(server, checkpoint):
    """The oracle is a stock LoRA hook on the positive prompt alone; the empty negative one is left as it is."""
    graph = Graph()
    image = draw(server, checkpoint, graph, add_gated(graph, checkpoint, "gated_hate"), prompt=HATE, batch_size=2)

    stock = Graph()
    expected = draw(
        server, checkpoint, stock, positive=add_prompt(stock, checkpoint, HATE, gated_hate=1.0), batch_size=2
    )
    assert_close(image, expected)
    ungated = Graph()
    everywhere = graphs.add_stock_loader(ungated, checkpoint, "gated_hate"), 0
    assert np.abs(image - draw(server, checkpoint, ungated, everywhere, prompt=HATE, batch_size=2)).max() > 20


def test_prompts_of_one_batch_each_get_their_own_categories(server, checkpoint):
    """By the report above, the hate gate opens on both unsafe prompts, the self-harm gate on its own only."""

    def add_all(graph: Graph, *conditions: tuple[str, int]) -> tuple[str, int]:
        first, second, third = conditions
        two = graph.add("ConditioningCombine", conditioning_1=first, conditioning_2=second), 0
        return graph.add("ConditioningCombine", conditioning_1=two, conditioning_2=third), 0

    graph = Graph()
    model = add_gated(graph, checkpoint, "gated_hate", "gated_self_harm", hate=0.5)
    prompts = [add_prompt(graph, checkpoint, prompt) for prompt in (SAFE, HATE, SELF_HARM)]
    image = draw(server, checkpoint, graph, model, positive=add_all(graph, *prompts))

    stock = Graph()
    hooks = {SAFE: {}, HATE: {"gated_hate": 0.5}, SELF_HARM: {"gated_hate": 0.5, "gated_self_harm": 1.0}}
    prompts = [add_prompt(stock, checkpoint, prompt, **hooked) for prompt, hooked in hooks.items()]
    assert_close(image, draw(server, checkpoint, stock, positive=add_all(stock, *prompts)))


def test_a_gate_and_a_part_of_the_sampling_combine(server, checkpoint):
    """The oracle is a stock hook whose strength falls to 0 half-way; the 4 steps begin at 1000, 750, 500 and 250."""
    graph = Graph()
    model = add_gated(graph, checkpoint, "gated_hate", end_percent=0.4)
    image = draw(server, checkpoint, graph, model, prompt=HATE, scheduler="simple")

    stock = Graph()
    positive = add_prompt(stock, checkpoint, HATE, gated_hate=1.0)
    on = stock.add("CreateHookKeyframe", strength_mult=1.0, start_percent=0.0)
    off = stock.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.4, prev_hook_kf=(on, 0))
    hook = next(node for node, entry in stock.items() if entry["class_type"] == "CreateHookLora")
    timed = stock.add("SetHookKeyframes", hooks=(hook, 0), hook_kf=(off, 0))
    stock[positive[0]]["inputs"]["hooks"] = [timed, 0]
    assert_close(image, draw(server, checkpoint, stock, positive=positive, scheduler="simple"))


def test_tiled_attention_keeps_rows_apart(server, checkpoint):
    images = []
    for is_gated in (True, False):
        graph = Graph()
        loader = graphs.checkpoint_loader(graph, checkpoint)
        tiles = {"tile_size": 32, "swap_size": 1, "max_depth": 0, "scale_depth": False}
        tiled = graph.add("HyperTile", model=(loader, 0), **tiles), 0
        if is_gated:
            link = {"model": add_gated(graph, checkpoint, "gated_hate", model=tiled), "prompt": HATE}
        else:
            link = {"model": tiled, "positive": add_prompt(graph, checkpoint, HATE, gated_hate=1.0)}
        images.append(draw(server, checkpoint, graph, **link))
    assert_close(*images)


def test_a_category_that_the_gate_does_not_know_always_acts(server, checkpoint):
    graph = Graph()
    model = add_gated(graph, checkpoint, "gated_hate", "gated_violence")
    image = draw(server, checkpoint, graph, model)

    stock = Graph()
    expected = draw(server, checkpoint, stock, (graphs.add_stock_loader(stock, checkpoint, "gated_violence"), 0))
    assert_close(image, expected)


def test_the_base_model_is_as_before_once_the_gated_one_is_gone(server, checkpoint):
    before = draw(server, checkpoint, Graph(), prompt=HATE)
    graph = Graph()
    gated = draw(server, checkpoint, graph, add_gated(graph, checkpoint, "gated_hate"), prompt=HATE)
    after = draw(server, checkpoint, Graph(), prompt=HATE, steps=5)  # steps: or the sampler's result is in the cache
    again = draw(server, checkpoint, Graph(), prompt=HATE)

    assert np.abs(gated - before).max() > 20
    np.testing.assert_array_equal(again, before)
    assert np.abs(after - before).max() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gated_violence", r"has none of the gate's categories \(hate, self-harm\)"),
        ("gated_text", "also changes the text encoder, which no gate can limit"),
    ],
)
def test_a_gate_that_could_not_do_its_work_is_refused(server, checkpoint, name, message):
    graph = Graph()
    with pytest.raises(SafetyExpertsError, match=message):
        draw(server, checkpoint, graph, add_gated(graph, checkpoint, name))
