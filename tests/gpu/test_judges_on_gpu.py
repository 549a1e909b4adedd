"""Judges on a CUDA device give the numbers they give on the CPU."""

import pytest
import small_clips
import torch
from safety_experts.evaluation.judges import choose_judge


@pytest.mark.parametrize("kind", ["clip-concepts", "classifier"])
def test_scores_are_those_of_the_cpu(tmp_path, kind):
    if kind == "classifier":
        values = {"folder": small_clips.write_classifier(tmp_path / "model"), "unsafe_labels": "thorns,stripes"}
    else:
        values = {"folder": small_clips.write_clip(tmp_path / "model"), "concepts": small_clips.CONCEPTS}
    choice, images = choose_judge(kind, values), small_clips.scenes("thorns", 8, 5000)

    on_gpu, on_cpu = (choice.load(device).read(images, [""] * 8) for device in ("cuda", "cpu"))

    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        # Margins of clip-concepts go to ±200, probabilities to 1.
        assert torch.allclose(torch.tensor(list(ours.values())), torch.tensor(list(theirs.values())), atol=0.1)
