"""The fitted merge in a real ComfyUI: strengths trained between other nodes' work, and in the file's metadata."""

import graphs
import pytest
from graphs import Graph
from safety_experts.errors import SafetyExpertsError
from safety_experts.experts.expert_file import load_expert

PROMPTS = "\n".join(f"a {colour} circle with thorns | a {colour} circle" for colour in ("red", "green", "blue"))
RECIPE = "steps=3\nbatch_size=2\nprecision=fp32"


def test_strengths_are_fitted_in_the_graph_and_saved(server, checkpoint, attention_shapes):
    generation = Graph()
    graphs.add_generation(generation, checkpoint, "to_fit_on", PROMPTS)
    server.run(generation)
    folder = server.base_directory / "models" / "loras"
    for seed, category in ((1, "violence"), (2, "hate")):
        path = folder / f"fit_{category}.safetensors"
        graphs.save_random_expert(path, seed, 2, 2.0, [category], attention_shapes)

    def merge(**inputs) -> tuple[Graph, str]:
        graph = Graph()
        slots = {
            f"experts__expert_{index}": graphs.add_expert(graph, f"fit_{category}")
            for index, category in enumerate(("violence", "hate"))
        }
        given = {
            "method__dataset": (graph.add("SafetyExpertsLoadDataset", dataset_name="to_fit_on"), 0),
            "method__checkpoint": "(the one that drew the dataset)",
            "method__recipe": (graph.add("SafetyExpertsRecipe", recipe="strengths", overrides=RECIPE), 0),
        }
        merged = graph.add("SafetyExpertsMerge", method="fitted", **slots, **{**given, **inputs})
        graph.add("SafetyExpertsSave", expert=(merged, 0), expert_name="fitted")
        # The merged expert draws right after training, with ComfyUI's models back in place.
        applied = graphs.add_apply(graph, checkpoint, (merged, 0))
        image = graphs.add_image(graph, checkpoint, "a red circle", 3, model=(applied, 0), clip=(applied, 1))
        return graph, image

    graph, image = merge()
    assert graphs.draw(server, graph, image).shape == (64, 64, 3)
    server.check_log()
    (path,) = (server.base_directory / "output" / "loras").glob("fitted_*.safetensors")
    fitted = load_expert(path)
    weights = [parent.weight for parent in fitted.info.parents]
    assert fitted.info.origin.method == "fitted"
    assert all(abs(weight - 1) > 0.01 for weight in weights)  # both random experts hurt, and both were trained
    assert [block.categories for block in fitted.info.rank_blocks] == [("violence",), ("hate",)]

    graph, image = merge(weights="0.5, 0.25")
    graphs.draw(server, graph, image)
    paths = sorted((server.base_directory / "output" / "loras").glob("fitted_*.safetensors"))
    assert [parent.weight for parent in load_expert(paths[-1]).info.parents] == [0.5, 0.25]

    graph, _ = merge(method__checkpoint="gone.safetensors")
    with pytest.raises(SafetyExpertsError, match="gone"):
        server.run(graph)
