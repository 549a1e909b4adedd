"""Fitted strengths: what is computed with them, how they are trained, and the merge made from them."""

import json

import pytest
import torch
from closeness import assert_close_at_scale
from safety_experts.commands import run as run_command
from safety_experts.errors import InputError
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.in_weights import add_to_weights
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import kohya_name
from safety_experts.experts.merging import merge_experts
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.models.denoiser import UNetDenoiser
from safety_experts.training.batches import BatchPlan
from safety_experts.training.lora import attach_lora
from safety_experts.training.policy import LoraPolicy
from safety_experts.training.recipe import Recipe, load_recipe
from safety_experts.training.run import TrainingRun
from safety_experts.training.strengths import _attach, fit_strengths
from small_training import SmallTraining
from tiny_models import MemoryCache, make_pair, tiny_unet


def make_expert(unet, seed: int, rank: int, size: float = 0.3, endings=("to_q", "to_v")) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        kohya_name(path): LoraLayer(
            torch.randn(rank, module.in_features, generator=generator) * size,
            torch.randn(module.out_features, rank, generator=generator) * size,
            3.0,
        )
        for path, module in unet.named_modules()
        if path.endswith(endings)
    }
    return Expert(layers, ExpertInfo(categories=[f"category {seed}"]), f"expert {seed}")


def test_the_model_computes_what_the_weighted_sum_computes():
    experts = [make_expert(tiny_unet(), 1, 2), make_expert(tiny_unet(), 2, 3, endings=("to_k", "to_v"))]
    fitted, dense = tiny_unet(), tiny_unet()
    attach_lora(fitted, Recipe(rank=4))
    _attach(fitted, experts, torch.nn.Parameter(torch.tensor([0.5, -2.0])))
    add_to_weights(dense, merge_experts(experts, "linear", weights=[0.5, -2.0]))
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([3, 700]), torch.randn(2, 3, 8)
    assert_close_at_scale(fitted(*inputs).sample, dense(*inputs).sample)


def test_the_strengths_alone_are_trained_and_move_down_the_gradient():
    experts = [make_expert(tiny_unet(), 1, 2), make_expert(tiny_unet(), 2, 2)]
    recipe = Recipe(rank=2, batch_size=2, accumulation_steps=1, warmup_steps=0, beta=50.0, learning_rate=1e-3)
    unet = tiny_unet()
    attach_lora(unet, recipe)
    strengths = torch.nn.Parameter(torch.ones(2))
    _attach(unet, experts, strengths)
    before = {name: value.clone() for name, value in unet.state_dict().items() if "strengths" not in name}
    denoiser = UNetDenoiser(unet, torch.linspace(0.999, 0.005, 1000), "epsilon")
    plan = BatchPlan([make_pair(number) for number in range(4)], MemoryCache(), recipe)
    run = TrainingRun(LoraPolicy(denoiser, 1.0, {"strengths": strengths}), plan, recipe, torch.device("cpu"))

    def loss_at(values) -> float:
        with torch.no_grad():
            strengths.copy_(torch.tensor(values))
        loss = run._scaled_gradients(1.0, lambda: False)["loss"]
        return loss

    step = 1e-2
    slopes = [
        (loss_at([1 + step, 1.0]) - loss_at([1 - step, 1.0])) / (2 * step),
        (loss_at([1.0, 1 + step]) - loss_at([1.0, 1 - step])) / (2 * step),
    ]
    loss_at([1.0, 1.0])
    run.take_step(lambda: False)
    moved = strengths.detach() - 1
    assert moved.abs().tolist() == pytest.approx([1e-3, 1e-3], rel=0.05)  # Adam's first step is the learning rate
    assert [float(value) < 0 for value in moved] == [slope > 0 for slope in slopes]
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in before.items())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return SmallTraining.create(tmp_path_factory.mktemp("small"))


def test_an_expert_that_hurts_is_turned_down_and_one_of_another_model_is_refused(small):
    unet = load_checkpoint(small.checkpoint).load_model()
    recipe = load_recipe("strengths", ["steps=8", "batch_size=2", "precision=fp32", "anchor_weight=1e5"])
    checkpoint = small.open_checkpoint()
    experts = [make_expert(unet, 1, 2, size=0.5), make_expert(unet, 2, 2, size=1e-4)]
    harmful, other = fit_strengths(experts, checkpoint, small.dataset, recipe, device="cpu")
    assert harmful < 0.7  # random changes move safe prompts, which the anchor forbids
    assert fit_strengths(experts, checkpoint, small.dataset, recipe, device="cpu") == [harmful, other]

    experts[1].layers["lora_unet_mid_block_nowhere"] = next(iter(experts[0].layers.values()))
    with pytest.raises(InputError, match="expert 1 and the others change layer lora_unet_mid_block_nowhere"):
        fit_strengths(experts, checkpoint, small.dataset, recipe, device="cpu")


def test_the_command_fits_writes_and_the_merge_says_its_weights(small, tmp_path, capsys, monkeypatch):
    unet = load_checkpoint(small.checkpoint).load_model()
    paths = []
    for number in (1, 2):
        save_expert(make_expert(unet, number, 2), tmp_path / f"expert_{number}.safetensors")
        paths.append(str(tmp_path / f"expert_{number}.safetensors"))
    recipe = tmp_path / "quick.yaml"
    recipe.write_text("steps: 2\nbatch_size: 2\naccumulation_steps: 1\nprecision: fp32\nlearning_rate: 0.1\n")
    out = tmp_path / "fitted.safetensors"
    command = ["merge", *paths, "--method", "fitted", "--out", str(out)]
    assert run_command(command) == 2
    assert "fitted needs weights: fit them on a dataset" in capsys.readouterr().err

    fit = ["--calibration", str(small.dataset.folder), "--model", str(small.checkpoint), "--recipe", str(recipe)]
    assert run_command([*command, *fit, "--tokenizer", str(small.tokenizer), "--device", "cpu", "--json"]) == 0
    weights = json.loads(capsys.readouterr().out.splitlines()[-1])["weights"]
    merged = load_expert(out)
    assert [parent.weight for parent in merged.info.parents] == weights != [1.0, 1.0]
    assert run_command(["reproduce", str(out)]) == 0
    linear = merge_experts([load_expert(path) for path in paths], "linear", weights=weights)
    assert merged.tensors_sha256() == linear.tensors_sha256()
