"""Training on a model with experts in it: `--with-expert`, and what style training does without it."""

import json

import pytest
import torch
from safety_experts.commands import run
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.demo.toy_checkpoint import ensure_toy_checkpoint
from safety_experts.errors import InputError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.in_weights import add_to_weights
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import kohya_name
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.toy.world import prompt_for, render_scene
from safety_experts.training.batches import BatchPlan
from safety_experts.training.cache import PairCache
from safety_experts.training.recipe import load_recipe
from tiny_models import tiny_unet

pytestmark = pytest.mark.slow

TOKENIZER = find_comfyui() / "comfy" / "sd1_tokenizer"
STYLE = ["steps=1", "batch_size=4", "precision=fp32", "objective={sigmoid: 0}", "sft_weight=1", "anchor_weight=0"]


def make_expert(unet: torch.nn.Module, name: str, size: float = 0.1) -> Expert:
    generator = torch.Generator().manual_seed(len(name))
    layers = {
        kohya_name(path): LoraLayer(
            torch.randn(2, module.in_features, generator=generator) * size,
            torch.randn(module.out_features, 2, generator=generator) * size,
            4.0,
        )
        for path, module in unet.named_modules()
        if path.endswith(("to_q", "to_v"))
    }
    return Expert(layers, ExpertInfo(categories=["violence"]), name)


def test_adding_an_expert_changes_the_weights_by_the_delta_and_no_others():
    unet, before = tiny_unet(), dict(tiny_unet().named_parameters())
    expert = make_expert(unet, "violence")
    add_to_weights(unet, expert)

    for name, weight in unet.named_parameters():
        layer = expert.layers.get(kohya_name(name.removesuffix(".weight")))
        expected = before[name] + (layer.delta() if layer else 0)
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1", (4, 4), "which the UNet has not"),
        ("lora_unet_conv_in", (4, 4), r"lora_unet_conv_in is \[4, 4\], where the UNet has \[\d+, 4, 3, 3\]"),
    ],
)
def test_an_expert_that_does_not_fit_is_an_input_error(name, shape, message):
    layer = LoraLayer(torch.ones(1, shape[1]), torch.ones(shape[0], 1), 1.0)
    with pytest.raises(InputError, match=message):
        add_to_weights(tiny_unet(), Expert({name: layer}, name="odd"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Four pictures to learn a style from; a style has no rejected picture, so both files of a pair are the same."""
    dataset = PreferenceDataset.create(tmp_path_factory.mktemp("data") / "style", DatasetInfo({}, {}, "rendered", ""))
    for seed, colour in enumerate(("red", "green", "blue", "yellow")):
        prompt, image = prompt_for(colour, "circle"), render_scene(colour, "circle", None, seed)
        dataset.add(PromptPair(prompt, prompt, ("style",), seed), image, image)
    return dataset


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(ensure_toy_checkpoint(), tokenizer_folder=TOKENIZER)


def train(dataset, out, *arguments) -> int:
    settings = [word for value in STYLE for word in ("--set", value)]
    command = ["train", "--model", str(ensure_toy_checkpoint()), "--dataset", str(dataset.folder), "--recipe", "toy"]
    command += ["--tokenizer", str(TOKENIZER), "--device", "cpu", "--out", str(out), "--json", *settings]
    return run([*command, *map(str, arguments)])


def denoising_error(checkpoint, dataset, expert: Expert | None) -> float:
    """The plain denoising error of the first batch by the model with the expert, without any trainer."""
    unet = checkpoint.load_model(dtype=torch.float32)
    for path, module in unet.named_modules():
        if expert and (layer := expert.layers.get(kohya_name(path))):
            module.weight.data += layer.delta()
    cache = PairCache(dataset, checkpoint, torch.device("cpu"), torch.float32)
    batch = BatchPlan(dataset.pairs, cache, load_recipe("toy", STYLE)).batch(0)
    alpha = checkpoint.noise.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1).float()
    noisy = alpha.sqrt() * batch.chosen + (1 - alpha).sqrt() * batch.noise
    hidden = cache.conditions(batch.prompts)["hidden_states"].float()
    with torch.no_grad():
        return float((unet(noisy, batch.timesteps, hidden).sample - batch.noise).square().mean())


def test_a_style_is_trained_apart_from_the_expert_unless_told(dataset, checkpoint, tmp_path, capsys):
    expert_path = tmp_path / "violence.safetensors"
    save_expert(make_expert(checkpoint.load_model(), "violence"), expert_path)
    losses = {}
    for name, extra in (("detached", ()), ("aligned", ("--with-expert", expert_path))):
        assert train(dataset, tmp_path / f"{name}.safetensors", *extra) == 0
        losses[name] = json.loads(capsys.readouterr().out)["loss"]

    expert = load_expert(expert_path)
    assert losses["detached"] == pytest.approx(denoising_error(checkpoint, dataset, None), rel=1e-3)
    assert losses["aligned"] == pytest.approx(denoising_error(checkpoint, dataset, expert), rel=1e-3)
    assert abs(losses["aligned"] / losses["detached"] - 1) > 0.01
    aligned, detached = (load_expert(tmp_path / f"{name}.safetensors") for name in ("aligned", "detached"))
    assert aligned.info.trained.trained_with == (expert.as_parent(),) and detached.info.trained.trained_with == ()
    assert run(["inspect", str(tmp_path / "aligned.safetensors")]) == 0
    assert f"trained with: violence [violence] {expert.file_sha256[:12]}" in capsys.readouterr().out
    assert set(aligned.layers) > set(expert.layers)  # a LoRA of its own, the expert is not in it
