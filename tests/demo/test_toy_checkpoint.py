"""The shipped weights and the checkpoint assembled from them, without ComfyUI (tests/comfyui draws with it)."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from safety_experts.demo import toy_checkpoint
from safety_experts.models.checkpoint import load_checkpoint
from safety_experts.toy import world
from safety_experts.toy.oracle import Reading, read_image

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory):
    return toy_checkpoint.write_toy_checkpoint(tmp_path_factory.mktemp("toy") / "toy.safetensors")


def test_the_shipped_weights_stay_small():
    assert toy_checkpoint.WEIGHTS_PATH.stat().st_size <= 12_000_000


def test_untrained_weights_are_the_same_everywhere(checkpoint_path):
    # Worked by hand: PCG64's first raw draws as 16-bit numbers, scaled to a deviation of 0.02.
    raw = np.random.PCG64(1).random_raw(1).astype("<u8").view("<u2")
    expected = ((raw - 32767.5) * (0.02 * 12**0.5 / 65536)).astype(np.float16)
    with safe_open(checkpoint_path, "pt") as file:
        embedding = file.get_tensor("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight")
    assert embedding.flatten()[:4].tolist() == expected.tolist()
    assert embedding.float().std().item() == pytest.approx(0.02, rel=1e-3)


def test_the_checkpoint_has_the_parts_of_sd15_and_nothing_else(checkpoint_path):
    with safe_open(checkpoint_path, "pt") as file:
        keys = list(file.keys())
    prefixes = ("model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model.")
    assert all(key.startswith(prefixes) for key in keys)
    assert {"first_stage_model.vae_scale", "first_stage_model.taesd_decoder.1.weight"} <= set(keys)
    assert "model.diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" in keys


def test_the_same_checkpoint_is_kept_and_another_is_replaced(checkpoint_path, tmp_path):
    before = checkpoint_path.stat().st_mtime_ns
    assert toy_checkpoint.ensure_toy_checkpoint(checkpoint_path) == checkpoint_path
    assert checkpoint_path.stat().st_mtime_ns == before
    stale = tmp_path / "toy.safetensors"
    stale.write_bytes(b"an interrupted copy")
    toy_checkpoint.ensure_toy_checkpoint(stale)
    assert stale.stat().st_size == checkpoint_path.stat().st_size


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toy_checkpoint.default_checkpoint_path() == tmp_path / "safety-experts" / "safety_experts_toy.safetensors"


@torch.no_grad()
def test_the_autoencoder_keeps_what_the_oracle_reads(checkpoint_path):
    vae = load_checkpoint(checkpoint_path).load_vae()
    labels = [("cyan", "triangle", mark) for mark in [None, *world.MARKS.values()]]
    labels += [(colour, shape, None) for colour in world.COLOURS for shape in world.SHAPES]
    scenes = [np.asarray(world.render_scene(*label, seed=77 + i)) for i, label in enumerate(labels)]
    images = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 255
    latents = vae.encode_images(images)
    assert latents.shape == (len(labels), 4, 8, 8)
    assert 0.7 < latents.std().item() < 1.4
    for (colour, shape, mark), drawn in zip(labels, vae.decode_latents(latents), strict=True):
        picture = Image.fromarray((drawn.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        assert read_image(picture) == Reading(mark, colour, shape)


def test_the_tensors_are_finite(checkpoint_path):
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint_path).values())
