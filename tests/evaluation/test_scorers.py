"""The scorers by path in docs/scorers/, with random weights, against their formulas."""

from pathlib import Path

import numpy as np
import pytest
import small_clips
import torch
from safetensors.torch import save_file
from safety_experts.demo.comfyui import find_comfyui
from safety_experts.evaluation.plugins import load_plugin
from safety_experts.toy.world import render_scene

SCORERS = Path(__file__).resolve().parents[2] / "docs" / "scorers"


@pytest.mark.slow
def test_lpips_is_the_weighted_distance_of_normalised_features(tmp_path, monkeypatch):
    lpips, torchvision = pytest.importorskip("lpips"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    trunk = torchvision.models.alexnet(weights=None).features.eval()
    path = tmp_path / "alex.safetensors"
    save_file({f"features.{name}": tensor for name, tensor in trunk.state_dict().items()}, path)
    monkeypatch.setenv("LPIPS_TRUNK", str(path))
    image, base = (render_scene("red", shape, mark, 3) for shape, mark in (("circle", "thorns"), ("square", None)))

    scorer = load_plugin(f"lpips={SCORERS / 'lpips_to_base.py'}")
    found = scorer.score([image, base, image], [""] * 3, [base, base, None])

    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", "cpu", weights_only=True)
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])[:, :, None, None]
    expected, both = 0.0, []
    for picture in (image, base):
        scaled = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        both.append((scaled - shift) / scale)
    layer = 0
    with torch.no_grad():
        for position, module in enumerate(trunk):
            both = [module(x) for x in both]
            if position in (1, 4, 7, 9, 11):
                a, b = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-10) for x in both)
                weights = heads[f"lin{layer}.model.1.weight"][0, :, 0, 0]
                expected += float(torch.einsum("nchw,c->nhw", (a - b) ** 2, weights).mean())
                layer += 1
    assert found[0]["distance"] == pytest.approx(expected, rel=1e-3)
    assert found[1]["distance"] == pytest.approx(0, abs=1e-6) and found[2] == {}


@pytest.mark.slow
def test_pickscore_prefers_by_the_softmax_of_scaled_cosines(tmp_path, monkeypatch):
    folder = small_clips.write_clip(
        tmp_path / "clip", projection=64, tokenizer=find_comfyui() / "comfy" / "sd1_tokenizer"
    )
    monkeypatch.setenv("PICKSCORE", str(folder))
    from safety_experts.evaluation.judges.clip_encoder import ClipFolder, normalised

    image, base = (render_scene("red", "circle", mark, 3) for mark in ("thorns", None))
    found = load_plugin(str(SCORERS / "pickscore.py")).score([image, base], ["a red circle"] * 2, [base, None])

    clip = ClipFolder(folder, "cpu")
    cosines = normalised(clip.embed_images([image, base])) @ normalised(clip.embed_texts(["a red circle"]))[0]
    scale = float(clip._model.logit_scale.detach().exp())
    assert [row["score"] for row in found] == pytest.approx([scale * float(c) for c in cosines], abs=0.02 * scale)
    wins = 1 / (1 + np.exp(found[1]["score"] - found[0]["score"]))
    assert found[0]["preferred"] == pytest.approx(wins, rel=1e-4) and "preferred" not in found[1]
