"""Heads on a CLIP embedding: against torch's own modules, on the right side of the normalisation, and wrong files."""

import itertools

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from safety_experts.errors import InputError
from safety_experts.evaluation.judges import choose_judge
from safety_experts.evaluation.judges.clip_heads import LaionHead, UnsafeHeads
from torch import nn


class _Encoder:
    """Gives planted embeddings, of any length."""

    version, batch_size = "planted", 32

    def __init__(self, embeddings):
        self._embeddings = embeddings

    def embed_images(self, images):
        return self._embeddings[: len(images)]


@pytest.fixture(scope="module")
def embeddings():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 768, generator=generator) * torch.linspace(0.2, 3, 6)[:, None]


def _unsafe_head(seed):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(768, 384), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(384), nn.Linear(384, 1)).eval()
    head[3].running_mean.uniform_(-1, 1)
    head[3].running_var.uniform_(0.1, 2)
    nn.init.normal_(head[3].weight)
    nn.init.normal_(head[4].weight, std=0.05)
    return head


class _Laion(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.mean, self.variance = torch.randn(768) * 0.01, torch.rand(768) * 0.001 + 1e-4
        widths = (768, 64, 512, 256, 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))

    def forward(self, unit):
        values = (unit - self.mean) / self.variance.sqrt()
        for layer in self.layers[:-1]:
            values = layer(values).relu()
        return self.layers[-1](values).sigmoid()[:, 0]

    def tensors(self):
        named = {"norm.mean": self.mean, "norm.variance": self.variance}
        for number, layer in enumerate(self.layers, start=1):
            named |= {f"linear_{number}.weight": layer.weight.detach(), f"linear_{number}.bias": layer.bias.detach()}
        return {name: value.contiguous() for name, value in named.items()}


@pytest.fixture
def heads(tmp_path):
    made = {"sexual": _unsafe_head(1), "violent": _unsafe_head(2)}
    for name, head in made.items():
        prefix = "linear_relu_stack." if name == "violent" else ""
        save_file({prefix + key: value for key, value in head.state_dict().items()}, tmp_path / f"{name}.safetensors")
    return tmp_path, made


IMAGES = [Image.new("RGB", (8, 8))] * 6


def test_unsafe_heads_read_the_embedding_as_it_is(heads, embeddings):
    folder, made = heads
    found = UnsafeHeads(_Encoder(embeddings), folder).read(IMAGES, [""] * 6)
    with torch.no_grad():
        for name, category in (("sexual", "sexual"), ("violent", "violence")):
            expected = made[name](embeddings).sigmoid()[:, 0]
            assert torch.allclose(torch.tensor([row[category] for row in found]), expected, atol=1e-5)
            unit = made[name](embeddings / embeddings.norm(dim=1, keepdim=True)).sigmoid()[:, 0]
            assert (expected - unit).abs().max() > 0.01  # the length counts
    assert UnsafeHeads(_Encoder(embeddings), folder / "sexual.safetensors").read(IMAGES, [""] * 6) == found


def test_laions_head_reads_the_embedding_at_length_one(tmp_path, embeddings):
    head = _Laion()
    save_file(head.tensors(), tmp_path / "head.safetensors")
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    with torch.no_grad():
        expected = head(unit)
    for factor in (1, 7):
        found = LaionHead(_Encoder(factor * embeddings), tmp_path / "head.safetensors").read(IMAGES, [""] * 6)
        assert torch.allclose(torch.tensor([row["nsfw"] for row in found]), expected, atol=1e-4)


def test_the_rules_say_which_cut_and_which_category():
    unsafe = choose_judge("unsafe-heads", {"heads": "h"})
    own = choose_judge("unsafe-heads", {"heads": "h", "rule": "own-category"})
    scores = {"sexual": 0.7, "violence": 0.2}
    assert unsafe.decide(scores, ["violence"]) is True and own.decide(scores, ["violence"]) is False
    assert own.decide(scores, ["self-harm"]) is None and own.decide(scores, ["sexual", "self-harm"]) is True
    laion = choose_judge("laion-nsfw", {"head": "h"})
    assert laion.decide({"nsfw": 0.5}) is True and laion.decide({"nsfw": 0.5}, rule="ninety") is False
    assert laion.decide({"nsfw": 0.9}, rule="ninety") is True


def test_wrong_files_are_refused_and_pickles_stay_closed(tmp_path, embeddings, heads):
    folder, made = heads
    encoder = _Encoder(embeddings)
    with pytest.raises(InputError, match="no such folder"):
        UnsafeHeads(encoder, tmp_path / "absent")
    pickle = tmp_path / "head.pt"
    torch.save(made["sexual"].state_dict(), pickle)
    with pytest.raises(InputError, match=r"the published \.pt is a pickle"):
        LaionHead(encoder, pickle)
    save_file({"linear_1.weight": torch.ones(2, 768)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"linear_1\.bias is missing"):
        LaionHead(encoder, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"for embeddings of 768 numbers, this CLIP gives 512"):
        UnsafeHeads(_Encoder(embeddings[:, :512]), folder).read(IMAGES, [""] * 6)
    save_file({"0.weight": torch.ones(2, 3)}, folder / "hateful.safetensors")
    with pytest.raises(InputError, match=r"hateful\.safetensors: lacks 0\.bias"):
        UnsafeHeads(encoder, folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds none of sexual"):
        UnsafeHeads(encoder, empty)


def test_judges_of_one_clip_share_it_and_its_passes(tmp_path):
    from PIL import Image
    from safety_experts.evaluation.judges import clip_encoder

    class Counting:
        version, batch_size, batches = "counting", 4, 0

        def embed_images(self, images):
            self.batches += 1
            return torch.full((len(images), 3), float(self.batches))

    encoder = Counting()
    first, second = (clip_encoder.shared_clip("key", lambda: encoder) for _ in range(2))
    assert first is second and first is not clip_encoder.shared_clip("other", lambda: encoder)
    images = [Image.new("RGB", (8, 8)) for _ in range(2)]
    assert torch.equal(first.embed_images(images), second.embed_images(list(images))) and encoder.batches == 1
    first.embed_images(images)[:] = 7  # what a judge does with it is its own
    assert second.embed_images(images)[0, 0] == 1
    assert first.embed_images(images[:1]).shape == (1, 3) and encoder.batches == 2
    assert second.embed_images([images[0].copy()])[0, 0] == 3
    del first, second
    assert clip_encoder.shared_clip("key", Counting).version == "counting" and encoder.batches == 3
