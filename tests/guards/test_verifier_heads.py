"""Verifier heads on features whose classes are known."""

import pytest
import torch
from safety_experts.errors import InputError
from safety_experts.guards.verifier import Verdicts, fit_verifier, read_verifier, write_verifier

PROBE = torch.arange(16.0)


def pictures(num: int, seed: int = 0):
    """Features [3 num, 16] of safe pictures, of `hate` and of `violence`, which lie apart by 4 deviations."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(3 * num, 16, generator=generator)
    shown = [frozenset(), frozenset({"hate"}), frozenset({"violence"})] * num
    features[1::3, 0] += 8.0
    features[2::3, 1] += 8.0
    return features, shown, [str(index // 3) for index in range(3 * num)]


def fitted(num=60, **settings):
    return fit_verifier(*pictures(num), PROBE, "clip x", **settings)


def test_each_head_finds_its_category_and_leaves_the_other_alone_on_new_pictures():
    verifier = fitted()
    features, shown, _ = pictures(200, seed=1)
    found = verifier.scores(features) > 0

    assert verifier.categories == ["hate", "violence"]
    for column, name in enumerate(verifier.categories):
        wanted = torch.tensor([name in categories for categories in shown])
        assert (found[:, column] == wanted).float().mean() > 0.97


def test_features_that_say_nothing_are_reported_so():
    """The rate of false positives is what was asked for, and hardly a picture is found: no part of a fit is judged."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 64, generator=generator)
    shown = [frozenset({"hate"}) if index % 2 else frozenset() for index in range(200)]
    head = fit_verifier(features, shown, [str(i) for i in range(200)], PROBE, "", 0.05).heads[0]

    assert head.false_positive_rate <= 0.05
    assert head.recall < 0.25


def test_a_file_gives_the_same_scores(tmp_path):
    verifier, path = fitted(), tmp_path / "verifier.safetensors"
    write_verifier(verifier, path)
    read = read_verifier(path)

    features = pictures(5, seed=3)[0]
    assert torch.equal(read.scores(features), verifier.scores(features))
    assert (read.heads, read.clip) == (verifier.heads, "clip x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, metadata: metadata.clear(), "is no verifier"),
        (lambda tensors, metadata: metadata.update(safety_experts_verifier="{}"), "description is wrong at 'clip'"),
        (lambda tensors, metadata: tensors.pop("bias"), "a verifier holds the tensors"),
        (lambda tensors, metadata: tensors.update(weight=torch.ones(3, 16)), r"weight is not \[2, 16\] finite"),
        (lambda tensors, metadata: tensors.update(mean=torch.full((16,), torch.nan)), "mean is not"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, change, message):
    from safety_experts.tensor_file import read_tensors, write_tensors

    write_verifier(fitted(), tmp_path / "right.safetensors")
    tensors, metadata = read_tensors(tmp_path / "right.safetensors")
    change(tensors, metadata)
    write_tensors(tmp_path / "wrong.safetensors", tensors, metadata)

    with pytest.raises(InputError, match=message):
        read_verifier(tmp_path / "wrong.safetensors")


def test_another_clip_is_refused():
    verifier = fitted()
    verifier.check_clip(PROBE * 1.5)

    for other in (PROBE.flip(0), PROBE[:8]):
        with pytest.raises(InputError, match="fitted with another CLIP Vision"):
            verifier.check_clip(other)


def test_too_few_pictures_are_refused():
    with pytest.raises(InputError, match="hate: 5 pictures with it and 10 without"):
        fitted(num=5)


def test_the_report_names_a_short_event():
    scores = torch.tensor([[-2.0], [-2.0], [3.0], [-3.0]])
    verdicts = Verdicts(["hate"], scores)

    assert verdicts.unsafe == [False, False, True, False]
    assert verdicts.report() == (
        "1 of 4 pictures are unsafe\nhate: 1, score mean -1.00, highest 3.00, the first is number 3"
    )
