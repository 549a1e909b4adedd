"""Protecting experts from a style LoRA in a real ComfyUI."""

import graphs
import numpy as np
import pytest
import torch
from graphs import Graph
from safetensors.torch import save_file
from safety_experts.errors import SafetyExpertsError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import kohya_name
from safety_experts.experts.overlap import overlap
from safety_experts.experts.protection import protect

PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def _layer(seed: int) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    return LoraLayer(torch.randn(4, 320, generator=generator), torch.randn(320, 4, generator=generator) / 20, 4.0)


@pytest.fixture(scope="module")
def names(server) -> dict[str, str]:
    """A style with peft's keys, which the stock loader ignores, and two experts; label -> name in the loras folders."""
    folder = server.base_directory / "output" / "loras" / "protection"
    folder.mkdir(parents=True)
    style = _layer(1)
    keys = {f"base_model.model.{PATH}.lora_A.weight": style.down, f"base_model.model.{PATH}.lora_B.weight": style.up}
    save_file(keys, folder / "style.safetensors")
    for seed, category in ((2, "hate"), (3, "violence")):
        expert = Expert({kohya_name(PATH): _layer(seed)}, ExpertInfo(categories=[category]), category)
        save_expert(expert, folder / f"{category}.safetensors")
    save_expert(Expert({"lora_unet_elsewhere": _layer(4)}), folder / "elsewhere.safetensors")
    return {name: f"protection/{name}.safetensors" for name in ("style", "hate", "violence", "elsewhere")}


def _load(graph: Graph, name: str) -> tuple[str, int]:
    return graph.add("SafetyExpertsLoad", expert_name=name), 0


def test_a_protected_style_is_saved_and_the_report_is_text(server, checkpoint, names):
    graph = Graph()
    slots = {f"experts__expert_{i}": _load(graph, names[name]) for i, name in enumerate(("hate", "violence"))}
    node = graph.add("SafetyExpertsProtect", style=_load(graph, names["style"]), space="both", strength=1.0, **slots)
    saved = graph.add("SafetyExpertsSave", expert=(node, 0), expert_name="protection/protected")
    shown = {
        key: graph.add("PreviewAny", source=source) for key, source in (("name", (saved, 0)), ("report", (node, 1)))
    }
    outputs = server.run(graph)["outputs"]
    report = outputs[shown["report"]]["text"][0]
    folder = server.base_directory / "output" / "loras"
    protected = load_expert(folder / outputs[shown["name"]]["text"][0])
    style, *experts = (load_expert(folder / names[name]) for name in ("style", "hate", "violence"))

    expected = protect(style, experts, space="both")
    assert torch.equal(protected.layers[kohya_name(PATH)].delta(), expected.layers[kohya_name(PATH)].delta())
    for expert in experts:
        assert f"style on {expert.name}: 1 of the style's 1 layers" in report
        assert abs(overlap(expert, protected)[kohya_name(PATH)].along_expert) < 1e-6
    assert report.count(kohya_name(PATH)) == 2 and "kept: 9" in report.splitlines()[-1]

    drawn = Graph()
    applied = drawn.add(
        "LoraLoaderModelOnly",
        model=(graphs.checkpoint_loader(drawn, checkpoint), 0),
        lora_name=outputs[shown["name"]]["text"][0],
        strength_model=1.0,
    )
    image = graphs.draw(server, drawn, graphs.add_image(drawn, checkpoint, "a red circle", 1, model=(applied, 0)))
    plain = Graph()
    base = graphs.draw(server, plain, graphs.add_image(plain, checkpoint, "a red circle", 1))
    assert np.abs(image - base).max() > 5
    server.check_log()


def test_a_style_of_another_model_is_a_one_line_error(server, names):
    graph = Graph()
    node = graph.add(
        "SafetyExpertsProtect",
        style=_load(graph, names["elsewhere"]),
        space="input",
        strength=1.0,
        experts__expert_0=_load(graph, names["hate"]),
    )
    graph.add("PreviewAny", source=(node, 1))
    with pytest.raises(SafetyExpertsError, match="elsewhere and hate have no layer in common") as caught:
        server.run(graph)
    assert "\n" not in str(caught.value)
