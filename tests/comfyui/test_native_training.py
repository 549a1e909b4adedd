"""Training on the MODEL in the graph: separate files, in a real ComfyUI, against the path by checkpoint."""

import json
import math
import shutil
from pathlib import Path

import graphs
import numpy as np
import pytest
import torch
from graphs import Graph
from safetensors.torch import load_file, save_file
from safety_experts.checkpoint_id import CheckpointId
from safety_experts.errors import SafetyExpertsError
from safety_experts.experts.expert_file import load_expert
from safety_experts.files import sha256_of_file
from safety_experts.preferences.dataset import PreferenceDataset

pytestmark = pytest.mark.slow

TEXT = "a red circle with thorns | a red circle\na blue square with thorns | a blue square"
OVERRIDES = "batch_size=2\nschedule=constant\nsave_steps=1000\nprecision=fp32\n"
PARTS = {
    "diffusion_models": "model.diffusion_model.",
    "text_encoders": "cond_stage_model.transformer.",
    "vae": "first_stage_model.",
}


@pytest.fixture(scope="module")
def parts(server, checkpoint) -> dict[str, str]:
    """The toy checkpoint as three files, as most of core's templates load a model: folder -> file name."""
    models = server.base_directory / "models"
    weights = load_file(models / "checkpoints" / checkpoint)
    names = {}
    for folder, prefix in PARTS.items():
        names[folder] = f"toy_{folder}.safetensors"
        (models / folder).mkdir(exist_ok=True)
        part = {key.removeprefix(prefix): value.clone() for key, value in weights.items() if key.startswith(prefix)}
        save_file(part, models / folder / names[folder])
    wide = {key: value.clone() for key, value in part.items()}  # a TAESD of 16 channels, as FLUX has
    wide["taesd_decoder.1.weight"] = wide["taesd_decoder.1.weight"].repeat(1, 4, 1, 1)
    for key in ("taesd_encoder.14.weight", "taesd_encoder.14.bias"):
        wide[key] = torch.cat([wide[key]] * 4)
    save_file(wide, models / "vae" / "taesd16.safetensors")
    return names


def add_parts(graph: Graph, parts: dict[str, str]) -> dict[str, tuple[str, int]]:
    """Add the three loaders; return model, clip and vae."""
    return {
        "model": (graph.add("UNETLoader", unet_name=parts["diffusion_models"], weight_dtype="default"), 0),
        "clip": (graph.add("CLIPLoader", clip_name=parts["text_encoders"], type="stable_diffusion"), 0),
        "vae": (graph.add("VAELoader", vae_name=parts["vae"]), 0),
    }


@pytest.fixture(scope="module")
def dataset(server, checkpoint, parts) -> str:
    graph = Graph()
    node = graphs.add_generation(graph, checkpoint, "by_parts", TEXT)  # its `checkpoint` has no effect
    graph[node]["inputs"].update({name: list(link) for name, link in add_parts(graph, parts).items()})
    server.run(graph)
    return "by_parts"


def train(graph: Graph, dataset: str, name: str, steps: int = 3, overrides: str = "", **inputs) -> str:
    recipe = graph.add("SafetyExpertsRecipe", recipe="toy", overrides=f"{OVERRIDES}steps={steps}\n{overrides}")
    settings = {"checkpoint": "(the one that drew the dataset)", "category": "all", "recipe_name": "toy"}
    opened = graph.add("SafetyExpertsLoadDataset", dataset_name=dataset)
    return graph.add(
        "SafetyExpertsTrain", dataset=(opened, 0), recipe=(recipe, 0), expert_name=name, **{**settings, **inputs}
    )


def expert_path(server, name: str) -> Path:
    return server.base_directory / "output" / "loras" / f"{name}_00001_.safetensors"


def losses_of(server, graph: Graph, node: str) -> list[float]:
    shown = graph.add("PreviewAny", source=(node, 1))
    return json.loads(server.run(graph)["outputs"][shown]["text"][0])["loss"]


def test_a_dataset_names_the_file_that_drew_it(server, parts, dataset):
    file = server.base_directory / "models" / "diffusion_models" / parts["diffusion_models"]
    info = PreferenceDataset.open(server.base_directory / "datasets" / dataset).info
    expected = CheckpointId(name=parts["diffusion_models"], sha256=sha256_of_file(file), family="sd15")
    assert info.base_checkpoint == expected


def test_separate_files_train_what_the_checkpoint_trains(server, checkpoint, parts, dataset):
    graph = Graph()
    native = losses_of(server, graph, train(graph, dataset, "native", **add_parts(graph, parts)))
    graph = Graph()
    by_checkpoint = losses_of(server, graph, train(graph, dataset, "by_checkpoint", checkpoint=checkpoint))

    # One is ComfyUI's model with its kernels, the other diffusers': equal as far as float32 goes.
    assert native == pytest.approx(by_checkpoint, rel=1e-4)
    experts = [load_expert(expert_path(server, name)) for name in ("native", "by_checkpoint")]
    assert experts[0].layers.keys() == experts[1].layers.keys()
    assert experts[0].info.base_checkpoint.name == parts["diffusion_models"]
    server.check_log()


REDIRECT = (
    "redirect=true\nobjective={}\nanchor_weight=0\nsft_weight=0\nleak_budget=1000\nheld_out_fraction=0.5\n"
    "evaluate_steps=1\nlearning_rate=0.001"
)


def test_redirect_on_a_model_is_redirect_on_its_checkpoint(server, checkpoint, parts, dataset):
    losses, metrics = [], []
    for name, base in (("redirect_native", None), ("redirect_checkpoint", {"checkpoint": checkpoint})):
        graph = Graph()
        where = base or add_parts(graph, parts)
        losses.append(losses_of(server, graph, train(graph, dataset, name, 6, overrides=REDIRECT, **where)))
        metrics.append(load_expert(expert_path(server, name)).info.trained.metrics)

    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    residuals = [values["eval/residual"] for values in metrics]
    assert residuals[0] == pytest.approx(residuals[1], rel=1e-2) and residuals[0] < 1


def test_the_stock_loader_gives_the_model_that_was_trained(server, parts, dataset):
    graph = Graph()
    loaders = add_parts(graph, parts)
    node = train(graph, dataset, "native_stock", steps=4, overrides="learning_rate=3e-3\nanchor_weight=0", **loaders)
    loaded = graph.add("LoraModelLoader", model=loaders["model"], lora=(node, 0), strength_model=1.0, bypass=True)
    bypass = graphs.draw(server, graph, add_image(graph, loaders, (loaded, 0)))
    graph = Graph()
    loaders = add_parts(graph, parts)
    name = expert_path(server, "native_stock").name
    patched = graph.add("LoraLoaderModelOnly", model=loaders["model"], lora_name=name, strength_model=1.0)
    stock = graphs.draw(server, graph, add_image(graph, loaders, (patched, 0)))
    graph = Graph()
    loaders = add_parts(graph, parts)
    base = graphs.draw(server, graph, add_image(graph, loaders, loaders["model"]))

    # Rounding differs between weights that are changed and a layer beside them, and sampling amplifies it.
    rounding, change = (np.abs(stock.astype(int) - other.astype(int)).mean() for other in (bypass, base))
    assert change > 2 and rounding < 0.1 * change
    assert "not loaded" not in server.log_text()


def add_image(graph: Graph, loaders: dict, model: tuple[str, int]) -> str:
    positive, negative = (
        graph.add("CLIPTextEncode", text=text, clip=loaders["clip"]) for text in ("a red circle with thorns", "")
    )
    latent = graph.add("EmptyLatentImage", width=graphs.SIZE_PX, height=graphs.SIZE_PX, batch_size=1)
    sampled = graph.add(
        "KSampler",
        model=model,
        positive=(positive, 0),
        negative=(negative, 0),
        latent_image=(latent, 0),
        seed=7,
        denoise=1.0,
        **graphs.SAMPLING,
    )
    decoded = graph.add("VAEDecode", samples=(sampled, 0), vae=loaders["vae"])
    return graph.add("SaveImage", images=(decoded, 0), filename_prefix="native")


def test_cancel_and_resume_are_bit_identical_and_samples_change_nothing(server, parts, dataset):
    steps = 12
    graph = Graph()
    node = train(graph, dataset, "native_cancelled", steps=steps, **add_parts(graph, parts))

    def cancel(node_id: str, value: int, total: int) -> None:
        if node_id == node and total == steps and value >= 3:
            server.interrupt()

    with pytest.raises(SafetyExpertsError, match="interrupted"):
        server.wait(server.queue(graph), on_progress=cancel)
    saved = load_expert(expert_path(server, "native_cancelled"))
    resumed, straight = Graph(), Graph()
    train(resumed, dataset, "native_cancelled", steps=steps, resume=True, **add_parts(resumed, parts))
    server.run(resumed)
    train(straight, dataset, "native_straight", steps=steps, sample_every=4, **add_parts(straight, parts))
    server.run(straight)

    assert 3 <= saved.info.trained.step < steps
    again = load_expert(expert_path(server, "native_cancelled").with_name("native_cancelled_00002_.safetensors"))
    assert again.tensors_sha256() == load_expert(expert_path(server, "native_straight")).tensors_sha256()


def test_a_lora_on_the_model_is_in_the_reference_and_not_in_the_file(server, parts, dataset):
    graph = Graph()
    loaders = add_parts(graph, parts)
    name = expert_path(server, "native_stock").name
    patched = graph.add("LoraLoaderModelOnly", model=loaders["model"], lora_name=name, strength_model=1.0)
    node = train(
        graph,
        dataset,
        "native_on_top",
        overrides="anchor_weight=0\nsft_weight=0",
        **(loaders | {"model": (patched, 0)}),
    )
    losses = losses_of(server, graph, node)
    base = load_expert(expert_path(server, "native_on_top")).info.base_checkpoint
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(base.patches) == 1


def test_weights_in_fp8_with_an_expert_on_them_train(server, parts, dataset):
    graph = Graph()
    loaders = add_parts(graph, parts)
    graph[loaders["model"][0]]["inputs"]["weight_dtype"] = "fp8_e4m3fn"
    name = expert_path(server, "native_stock").name
    patched = graph.add("LoraLoaderModelOnly", model=loaders["model"], lora_name=name, strength_model=1.0)
    node = train(
        graph, dataset, "native_fp8", overrides="anchor_weight=0\nsft_weight=0", **(loaders | {"model": (patched, 0)})
    )
    losses = losses_of(server, graph, node)
    expert = load_expert(expert_path(server, "native_fp8"))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are rounded alike
    assert all(layer.up.any() for layer in expert.layers.values())


def test_another_base_is_said_and_one_of_other_latents_is_refused(server, parts, dataset):
    datasets = server.base_directory / "datasets"
    for family in ("sd20", "flux"):  # the first draws in SD1.5's latents, the second in others
        shutil.copytree(datasets / dataset, datasets / family)
        info = json.loads((datasets / family / "dataset.json").read_text())
        info["base_checkpoint"] = {"name": "other.safetensors", "sha256": "0" * 64, "family": family}
        (datasets / family / "dataset.json").write_text(json.dumps(info))
    graph = Graph()
    train(graph, "sd20", "another", **add_parts(graph, parts))
    server.run(graph)
    assert "the dataset was drawn by other.safetensors" in server.log_text()
    graph = Graph()
    train(graph, "flux", "refused", **add_parts(graph, parts))
    with pytest.raises(SafetyExpertsError, match="whose latents are not those of"):
        server.run(graph)


@pytest.mark.parametrize(
    ("missing", "inputs", "message"),
    [
        (("vae",), {}, "vae is not connected: training on a MODEL needs its CLIP and VAE"),
        (("clip", "vae"), {}, "clip and vae are not connected"),
        ((), {"clip_type": "sd3"}, "clip is not this model's"),
        ((), {"processes": 2}, "a connected MODEL trains in one process"),
        ((), {"vae": "taesd16.safetensors"}, r"the VAE gives 16 channels and this model draws in 4 \(SD15\)"),
    ],
)
def test_what_is_missing_is_named(server, parts, dataset, missing, inputs, message):
    inputs = dict(inputs)
    graph = Graph()
    loaders = {name: link for name, link in add_parts(graph, parts).items() if name not in missing}
    if kind := inputs.pop("clip_type", None):  # of the same file, whose conditions the cache holds by now
        graph[loaders["clip"][0]]["inputs"]["type"] = kind
    if vae := inputs.get("vae"):
        loaders["vae"] = (graph.add("VAELoader", vae_name=vae), 0)
    train(graph, dataset, "wrong", **inputs | loaders)
    with pytest.raises(SafetyExpertsError, match=message):
        server.run(graph)


def test_nothing_is_drawn_where_the_pairs_could_train_nothing(server, checkpoint, parts):
    graph = Graph()
    node = graphs.add_generation(graph, checkpoint, "not_drawn", TEXT)
    graph[node]["inputs"]["vae"] = [graph.add("VAELoader", vae_name="taesd16.safetensors"), 0]
    with pytest.raises(SafetyExpertsError, match=r"the VAE gives 16 channels and this model draws in 4 \(SD15\)"):
        server.run(graph)
    assert not (server.base_directory / "datasets" / "not_drawn").exists()
