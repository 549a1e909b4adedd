"""Loading, merging and applying experts in a real ComfyUI, against its stock LoRA loader."""

import graphs
import numpy as np
import pytest
import torch
from graphs import Graph, save_random_expert
from safety_experts.errors import SafetyExpertsError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import kohya_name
from safety_experts.models.checkpoint import load_checkpoint

PROMPT, SEED = "a red circle with thorns", 5
TAXONOMY = """\
categories: {violence: [thorns], hate: [a black cross]}
lists: {colour: [red, blue]}
templates: [{prompt: "a {colour} circle with {concept}", safe_prompt: "a {colour} circle"}]
"""


@pytest.fixture(scope="session")
def expert_files(server, attention_shapes) -> None:
    """Two strong random experts of different rank and alpha, a plain LoRA, and experts for other models."""
    folder = server.base_directory / "output" / "loras"

    def make(name: str, seed: int, rank: int, alpha: float, categories: list[str], shapes: dict) -> None:
        save_random_expert(folder / f"{name}.safetensors", seed, rank, alpha, categories, shapes)

    make("hate", 1, 4, 4.0, ["hate"], attention_shapes)
    make("self_harm", 2, 3, 6.0, ["self-harm"], attention_shapes)
    make("plain", 3, 4, 4.0, [], attention_shapes)
    make("other_width", 4, 4, 4.0, ["hate"], {key: (out, 2 * width) for key, (out, width) in attention_shapes.items()})
    make("other_layers", 5, 4, 4.0, ["hate"], {f"{key}_elsewhere": shape for key, shape in attention_shapes.items()})
    (folder / "junk.safetensors").write_bytes(b"not safetensors")


def _merge(graph: Graph, *experts: tuple[str, int], **inputs) -> tuple[str, int]:
    slots = {f"experts__expert_{index}": expert for index, expert in enumerate(experts)}
    return graph.add("SafetyExpertsMerge", **{"method": "linear", **slots, **inputs}), 0


def _draw(server, checkpoint: str, graph: Graph, node: str | None) -> np.ndarray:
    links = {"model": (node, 0), "clip": (node, 1)} if node else {}
    return graphs.draw(server, graph, graphs.add_image(graph, checkpoint, PROMPT, SEED, **links))


@pytest.fixture(scope="session")
def base_image(server, checkpoint) -> np.ndarray:
    return _draw(server, checkpoint, Graph(), None)


def _image_of_stock(server, checkpoint, *names_and_strengths: tuple[str, float]) -> np.ndarray:
    graph, node = Graph(), None
    for name, strength in names_and_strengths:
        node = graphs.add_stock_loader(graph, checkpoint, name, strength, model=(node, 0) if node else None)
    return _draw(server, checkpoint, graph, node)


@pytest.mark.usefixtures("expert_files")
class TestApply:
    def test_at_strength_1_the_image_is_the_stock_loaders(self, server, checkpoint, base_image):
        graph = Graph()
        image = _draw(server, checkpoint, graph, graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, "hate")))

        np.testing.assert_array_equal(image, _image_of_stock(server, checkpoint, ("hate", 1.0)))
        assert np.abs(image - base_image).max() > 20
        server.check_log()

    def test_at_strength_0_the_image_is_the_base_models(self, server, checkpoint, base_image):
        graph = Graph()
        node = graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, "self_harm"), self_harm=0.0)

        np.testing.assert_array_equal(_draw(server, checkpoint, graph, node), base_image)

    def test_half_of_a_category_is_half_of_the_stock_strength(self, server, checkpoint):
        graph = Graph()
        node = graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, "self_harm"), self_harm=0.5, hate=0.0)

        expected = _image_of_stock(server, checkpoint, ("self_harm", 0.5))
        assert np.abs(_draw(server, checkpoint, graph, node) - expected).max() <= 1

    def test_the_strength_other_acts_on_a_lora_without_categories(self, server, checkpoint):
        graph = Graph()
        node = graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, "plain"), other=0.5, hate=0.0)

        expected = _image_of_stock(server, checkpoint, ("plain", 0.5))
        assert np.abs(_draw(server, checkpoint, graph, node) - expected).max() <= 1

    def test_the_base_model_stays_as_it_is(self, server, checkpoint, base_image):
        graph = Graph()
        loader = graphs.checkpoint_loader(graph, checkpoint)
        node = graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, "hate"))
        graphs.add_image(graph, checkpoint, PROMPT, SEED, model=(node, 0))
        plain = graphs.add_image(graph, checkpoint, PROMPT, SEED, model=(loader, 0))

        np.testing.assert_array_equal(graphs.draw(server, graph, plain), base_image)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "other_layers",
                r"other_layers does not fit this model: \d+ of \d+ layers are not in it.*base.safetensors",
            ),
            ("other_width", r"other_width does not fit this model: layer \w+ is \[\d+, \d+\] in the expert"),
            ("junk", r"junk.safetensors is truncated or not a safetensors file"),
        ],
    )
    def test_an_expert_that_does_not_fit_is_a_one_line_error(self, server, checkpoint, name, message, base_image):
        graph = Graph()
        with pytest.raises(SafetyExpertsError, match=message) as caught:
            _draw(server, checkpoint, graph, graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, name)))

        assert "\n" not in str(caught.value)
        np.testing.assert_array_equal(_draw(server, checkpoint, Graph(), None), base_image)


@pytest.fixture(scope="session")
def diffusers_file(server, checkpoint) -> str:
    """A LoRA written as SafetyDPO's training script does; returns the name of the same one with kohya's keys."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    path = server.base_directory / "models" / "checkpoints" / checkpoint
    unet = load_checkpoint(path).load_model()
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    unet.add_adapter(config)
    tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    folder = server.base_directory / "output" / "loras"
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=tensors, weight_name="diffusers.safetensors")
    layers = {
        kohya_name(path): LoraLayer(module.lora_A["default"].weight, module.lora_B["default"].weight, 4.0)
        for path, module in unet.named_modules()
        if hasattr(module, "lora_A")
    }
    save_expert(Expert(layers, ExpertInfo()), folder / "kohya.safetensors")
    return "kohya"


@pytest.mark.usefixtures("expert_files")
class TestOtherPeoplesFiles:
    def test_a_file_that_diffusers_wrote_acts_like_the_same_one_with_kohya_keys(
        self, server, checkpoint, diffusers_file, base_image
    ):
        graph = Graph()
        node = graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, "diffusers"))
        image = _draw(server, checkpoint, graph, node)

        np.testing.assert_array_equal(image, _image_of_stock(server, checkpoint, (diffusers_file, 1.0)))
        assert np.abs(image - base_image).max() > 20


@pytest.mark.usefixtures("expert_files")
class TestPartOfTheSampling:
    """At 4 steps the normal scheduler samples timesteps 999, 666, 333 and 0: half-way lies between steps 2 and 3."""

    def test_a_range_that_covers_every_step_gives_the_patched_image(self, server, checkpoint):
        """The simple scheduler's 4 steps begin at timesteps 999, 749, 499 and 249: 0.9 (timestep 99) covers them."""
        gated, patched = Graph(), Graph()
        nodes = (
            graphs.add_apply(gated, checkpoint, graphs.add_expert(gated, "hate"), end_percent=0.9),
            graphs.add_stock_loader(patched, checkpoint, "hate"),
        )
        images = []
        for graph, node in zip((gated, patched), nodes, strict=True):
            links = {"model": (node, 0), "clip": (node, 1)}
            saved = graphs.add_image(graph, checkpoint, PROMPT, SEED, scheduler="simple", **links)
            images.append(graphs.draw(server, graph, saved))
        assert np.abs(images[0] - images[1]).max() <= 1

    def test_two_experts_in_two_halves_are_two_samplers_in_a_row(self, server, checkpoint):
        graph = Graph()
        first = graphs.add_apply(graph, checkpoint, graphs.add_expert(graph, "hate"), end_percent=0.5)
        both = graphs.add_apply(
            graph, checkpoint, graphs.add_expert(graph, "self_harm"), model=(first, 0), start_percent=0.5
        )
        image = _draw(server, checkpoint, graph, both)

        stock = Graph()
        halves = [(graphs.add_stock_loader(stock, checkpoint, name), 0) for name in ("hate", "self_harm")]
        saved = graphs.add_image(stock, checkpoint, PROMPT, SEED)
        sampler = next(key for key, node in stock.items() if node["class_type"] == "KSampler")
        common = {k: v for k, v in stock[sampler]["inputs"].items() if k not in ("seed", "denoise", "model")}
        common |= {"noise_seed": SEED}
        steps = {"start_at_step": 0, "end_at_step": 2, "add_noise": "enable", "return_with_leftover_noise": "enable"}
        early = stock.add("KSamplerAdvanced", **{**common, **steps, "model": halves[0]})
        steps = {"start_at_step": 2, "end_at_step": 4, "add_noise": "disable", "return_with_leftover_noise": "disable"}
        late = stock.add("KSamplerAdvanced", **{**common, **steps, "model": halves[1], "latent_image": (early, 0)})
        decoder = stock[saved]["inputs"]["images"][0]
        stock[decoder]["inputs"]["samples"] = [late, 0]
        del stock[sampler]

        assert np.abs(image - graphs.draw(server, stock, saved)).max() <= 1


@pytest.mark.usefixtures("expert_files")
class TestMerge:
    def test_a_weighted_sum_is_two_stock_loaders_in_a_row(self, server, checkpoint):
        graph = Graph()
        merged = _merge(
            graph, graphs.add_expert(graph, "hate"), graphs.add_expert(graph, "self_harm"), weights="1, 0.5"
        )
        image = _draw(server, checkpoint, graph, graphs.add_apply(graph, checkpoint, merged))

        expected = _image_of_stock(server, checkpoint, ("hate", 1.0), ("self_harm", 0.5))
        assert np.abs(image - expected).max() <= 1

    def test_a_merge_keeps_one_strength_a_category(self, server, checkpoint):
        graph = Graph()
        merged = _merge(graph, graphs.add_expert(graph, "hate"), graphs.add_expert(graph, "self_harm"))
        image = _draw(server, checkpoint, graph, graphs.add_apply(graph, checkpoint, merged, hate=0.0, self_harm=0.5))

        expected = _image_of_stock(server, checkpoint, ("self_harm", 0.5))
        assert np.abs(image - expected).max() <= 1

    def test_a_saved_co_merge_is_an_ordinary_lora_of_whole_rows(self, server, checkpoint):
        graph = Graph()
        loader = graphs.checkpoint_loader(graph, checkpoint)
        pairs = graph.add(
            "SafetyExpertsPromptPairs", source="taxonomy", source__taxonomy=TAXONOMY, source__first_seed=0
        )
        merged = _merge(
            graph,
            graphs.add_expert(graph, "hate"),
            graphs.add_expert(graph, "self_harm"),
            method="co-merge",
            method__model=(loader, 0),
            method__clip=(loader, 1),
            method__prompt_pairs=(pairs, 0),
            method__num_prompts=3,
            method__calibration_steps=3,
            method__width=graphs.SIZE_PX,
            method__height=graphs.SIZE_PX,
        )
        graph.add("SafetyExpertsSave", expert=merged, expert_name="co_merged")
        image = _draw(server, checkpoint, graph, graphs.add_apply(graph, checkpoint, merged))

        np.testing.assert_array_equal(image, _image_of_stock(server, checkpoint, ("co_merged_00001_", 1.0)))
        folder = server.base_directory / "output/loras"
        result = load_expert(folder / "co_merged_00001_.safetensors")
        parents = [load_expert(folder / f"{name}.safetensors") for name in ("hate", "self_harm")]
        winners = set()
        for name, layer in result.layers.items():
            rows = [(layer.delta() - parent.layers[name].delta()).abs().amax(dim=1) < 1e-6 for parent in parents]
            assert torch.logical_or(*rows).all()
            winners |= {index for index, row in enumerate(rows) if row.any()}
        assert winners == {0, 1}
        assert result.categories == ["hate", "self-harm"]
        server.check_log()

    def test_every_save_gets_a_file_of_its_own(self, server):
        names = []
        for weights in ("1", "0.5"):
            graph = Graph()
            merged = _merge(graph, graphs.add_expert(graph, "hate"), weights=weights)
            saved = graph.add("SafetyExpertsSave", expert=merged, expert_name="sub/again")
            shown = graph.add("PreviewAny", source=(saved, 0))
            names.append(server.run(graph)["outputs"][shown]["text"][0])

        assert names == ["sub/again_00001_.safetensors", "sub/again_00002_.safetensors"]
        assert all((server.base_directory / "output/loras" / name).is_file() for name in names)

    @pytest.mark.parametrize(
        ("names", "inputs", "message"),
        [
            (("hate", "self_harm"), {"weights": "1, x"}, "give one number an expert"),
            (("hate", "self_harm"), {"weights": "1"}, "1 weights for 2 experts"),
            (("hate", "other_width"), {}, "only LoRAs of one model family go together"),
            (("hate",), {"expert_name": "../out"}, "leaves the folder"),
        ],
    )
    def test_a_wrong_merge_is_a_one_line_error(self, server, names, inputs, message):
        graph = Graph()
        target = inputs.pop("expert_name", "wrong")
        merged = _merge(graph, *[graphs.add_expert(graph, name) for name in names], **inputs)
        graph.add("SafetyExpertsSave", expert=merged, expert_name=target)

        with pytest.raises(SafetyExpertsError, match=message) as caught:
            server.run(graph)

        assert "\n" not in str(caught.value)
        assert not list((server.base_directory / "output/loras").glob("wrong*"))
