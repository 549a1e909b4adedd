from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safety_experts.commands import run
from safety_experts.errors import InputError
from safety_experts.experts.co_merge import load_activation_counts
from safety_experts.experts.expert import Expert, LoraLayer
from safety_experts.experts.expert_file import load_expert, save_expert
from safety_experts.experts.info import ExpertInfo
from safety_experts.experts.keys import kohya_name
from safety_experts.experts.merging import merge_experts
from safety_experts.models import checkpoint as models_checkpoint
from safety_experts.models.denoiser import UNetDenoiser
from safety_experts.preferences.dataset import DatasetInfo, PreferenceDataset
from safety_experts.preferences.pairs import PromptPair
from safety_experts.training.calibration import collect_activation_counts, count_activations


class Cache:
    """Latents [4, 4, 4] and conditions [5, 8] from the pair's id and the prompt."""

    def latents(self, pair):
        generator = torch.Generator().manual_seed(pair.id)
        return tuple(torch.randn(4, pair.size, 4, generator=generator) for _ in range(2))

    def conditions(self, prompts):
        values = [torch.randn(5, 8, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
        return {"hidden_states": torch.stack(values)}


@pytest.fixture(scope="module")
def denoiser():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    return UNetDenoiser(unet.eval(), torch.linspace(0.999, 0.005, 1000), "epsilon")


@pytest.fixture
def experts(denoiser):
    made = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        layers = {
            kohya_name(path): LoraLayer(
                torch.randn(2, module.in_features, generator=generator),
                torch.randn(module.out_features, 2, generator=generator),
                2.0,
            )
            for path, module in denoiser.model.named_modules()
            if path.endswith(("attn1.to_q", "attn2.to_k"))
        }
        made.append(Expert(layers, ExpertInfo(), f"expert_{seed}"))
    return made


def make_pairs(num, size=4):
    return [SimpleNamespace(id=number, prompt="x" * number, size=size) for number in range(num)]


def test_every_token_and_row_has_one_winner(denoiser, experts):
    seen = []
    pairs = make_pairs(11)
    counts = count_activations(
        experts, denoiser, Cache(), pairs, seed=0, device="cpu", on_step=lambda *step: seen.append(step)
    )
    assert seen == [(8, 11), (11, 11)]
    for name, values in counts.items():
        tokens = 16 if "attn1" in name else 5  # latent pixels, or tokens of the prompt
        assert values.sum(dim=0).eq(11 * tokens).all()
        assert values.shape == (2, 16)
    assert (counts[next(iter(counts))] > 0).all()


def test_counts_depend_on_the_seed_and_not_on_the_grouping(denoiser, experts):
    def count(pairs, seed=0):
        return count_activations(experts, denoiser, Cache(), pairs, seed=seed, device="cpu")

    pairs = [*make_pairs(9), *make_pairs(3, size=6)]
    together, again, other = count(pairs), count(pairs), count(pairs, seed=1)
    first, rest = count(pairs[:2]), count(pairs[2:])
    for name, values in together.items():
        assert torch.equal(again[name], values)
        # Rounding differs with the batch, so a near tie may fall to the other side.
        assert (first[name] + rest[name] - values).abs().sum() <= 0.001 * values.sum()
    assert any(not torch.equal(other[name], values) for name, values in together.items())


def test_statistics_serve_a_co_merge_and_leave_no_hooks(denoiser, experts):
    counts = count_activations(experts, denoiser, Cache(), make_pairs(4), seed=0, device="cpu")
    merged = merge_experts(experts, "co-merge", activation_counts=counts)
    assert merged.layers.keys() == experts[0].layers.keys()
    assert not any(module._forward_pre_hooks for module in denoiser.model.modules())


def test_a_dataset_without_pairs_is_named(experts, tmp_path):
    empty = PreferenceDataset.create(tmp_path / "empty", DatasetInfo({}, {}, "toy", ""))
    with pytest.raises(InputError, match="empty"):
        collect_activation_counts(experts, SmallCheckpoint(None), empty, device="cpu")


class SmallCheckpoint:
    """A checkpoint whose VAE pools 8x8 pixels and whose text encoder counts letters, around the tiny UNet."""

    encoding_id = "0" * 16

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def make_denoiser(self, model, autocast_dtype):
        return self.denoiser

    def load_vae(self, dtype, device):
        return self

    def load_text_encoder(self, dtype, device):
        return self

    def load_model(self, dtype, device):
        return self.denoiser.model

    def encode_images(self, images):
        return torch.nn.functional.avg_pool2d(images, 8)[:, [0, 1, 2, 0]]

    def encode_prompts(self, prompts):
        return {"hidden_states": torch.tensor([[[len(p) + n for n in range(8)]] * 5 for p in prompts]).float()}


def test_merge_command_calibrates_on_a_dataset_and_keeps_the_counts(denoiser, experts, tmp_path, monkeypatch, capsys):
    dataset = PreferenceDataset.create(tmp_path / "pairs", DatasetInfo({}, {}, "toy", ""))
    for number in range(3):
        pair = PromptPair(f"a red circle with thorns {number}", f"a red circle {number}", ("violence",), number)
        dataset.add(pair, Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), (9 * number, 99, 0)))
    files = []
    for expert in experts:
        files.append(str(tmp_path / f"{expert.name}.safetensors"))
        save_expert(expert, files[-1])
    monkeypatch.setattr(models_checkpoint, "load_checkpoint", lambda path, tokenizer_folder: SmallCheckpoint(denoiser))
    counts, out, again = (tmp_path / f"{name}.safetensors" for name in ("counts", "merged", "again"))

    command = ["merge", *files, "--method", "co-merge", "--statistics", str(counts)]
    options = ["--calibration", str(tmp_path / "pairs"), "--model", "small.safetensors", "--num-prompts", "2"]
    assert run([*command, *options, "--out", str(out)]) == 0, capsys.readouterr().err

    for name, values in load_activation_counts(counts, experts).items():
        assert values.sum(dim=0).eq(2 * (16 if "attn1" in name else 5)).all()
    assert run(["reproduce", str(out), "--statistics", str(counts)]) == 0
    assert run([*command, "--out", str(again)]) == 0
    assert load_expert(again).tensors_sha256() == load_expert(out).tensors_sha256()
