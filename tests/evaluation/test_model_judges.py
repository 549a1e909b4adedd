"""Judges that run a transformers model: a small CLIP and a small classifier, read from disk."""

import json
import shutil

import pytest
import small_clips
import torch
from PIL import Image
from safety_experts.errors import InputError
from safety_experts.evaluation.judges import choose_judge
from safety_experts.evaluation.judges.clip_concepts import check_towers, num_told
from safety_experts.evaluation.judges.clip_encoder import ClipFolder, preprocess
from safety_experts.evaluation.judges.q16 import Q16
from safety_experts.evaluation.judges.q16_training import fit, train_vectors
from safety_experts.evaluation.judges.q16_vectors import read_vectors, write_vectors

NUM_IMAGES = 12


@pytest.fixture(scope="module")
def encoder(clip_folder):
    return ClipFolder(clip_folder, "cpu")


def test_clip_sees_what_transformers_shows_it(encoder, clip_folder):
    from transformers import CLIPImageProcessor, CLIPModel

    image = Image.effect_mandelbrot((150, 97), (-2, -1.2, 1, 1.2), 60).convert("RGB")
    processor = CLIPImageProcessor(
        size={"shortest_edge": small_clips.SIZE_PX},
        crop_size={"height": small_clips.SIZE_PX, "width": small_clips.SIZE_PX},
    )
    expected = processor(image, return_tensors="pt")["pixel_values"]
    pixels = preprocess(image, small_clips.SIZE_PX)

    # Two resize implementations differ by a level or two of 255; a wrong crop or order of colours by many.
    assert (pixels - expected[0]).abs().mean() < 0.01
    with torch.no_grad():
        found = CLIPModel.from_pretrained(clip_folder).get_image_features(pixel_values=pixels[None])
    assert torch.allclose(encoder.embed_images([image]), getattr(found, "pooler_output", found), atol=1e-4)


def test_embeddings_do_not_depend_on_the_batch(encoder):
    images = small_clips.scenes("thorns", 3, 50)

    together = encoder.embed_images(images)

    assert torch.allclose(together, torch.cat([encoder.embed_images([image]) for image in images]), atol=1e-4)


def test_concepts_find_the_marks_they_name_and_leave_plain_pictures_alone(clip_folder):
    choice = choose_judge("clip-concepts", {"folder": clip_folder, "concepts": small_clips.CONCEPTS})
    judge = choice.load()

    def flagged(mark, category):
        scores = judge.read(small_clips.scenes(mark, NUM_IMAGES, 5000), [""] * NUM_IMAGES)
        return sum(choice.decide(score, [category]) for score in scores)

    for mark, category in (("thorns", "violence"), ("stripes", "hate"), ("ring", "own")):
        assert flagged(mark, category) >= 0.7 * NUM_IMAGES
        assert flagged(None, category) <= 1


def test_a_category_without_a_concept_is_unknown_not_safe():
    choice = choose_judge("clip-concepts", {"concepts": {"violence": "a | b"}, "threshold": 1.0})

    assert choice.decide({"violence": -3.0}, ["violence"]) is False
    assert choice.decide({"violence": 0.5}, ["violence"]) is False
    assert choice.decide({"violence": 3.0}, ["violence"]) is True
    assert choice.decide({"violence": 3.0}, ["hate"]) is None
    assert choice.decide({"violence": 3.0}, ["hate"], rule="any-category") is True


def test_towers_that_do_not_belong_together_are_refused(encoder):
    check_towers(encoder)

    class Mixed:
        version, batch_size = "mixed", 8
        embed_images = staticmethod(encoder.embed_images)

        @staticmethod
        def embed_texts(texts):
            # Such as a text tower whose projection was never loaded.
            return encoder.embed_texts(texts) @ torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    with pytest.raises(InputError, match="do not belong together"):
        check_towers(Mixed())


def test_colours_told_are_counted_without_what_all_texts_share():
    images, offset = torch.eye(3), torch.tensor([[0.0, 5.0, 0.0]])

    assert num_told(images, images) == 3
    assert num_told(images, images.roll(1, 0)) == 0
    assert num_told(images + offset, images) == 3


def test_an_image_tower_alone_serves_q16_but_no_concepts(tmp_path):
    folder = small_clips.write_clip(tmp_path / "vision", image_only=True)

    assert ClipFolder(folder, "cpu").embed_images(small_clips.scenes(None, 1, 0)).shape == (1, 64)
    with pytest.raises(InputError, match="image tower of a CLIP only"):
        choose_judge("clip-concepts", {"folder": folder}).load()


def test_missing_weights_pickles_and_other_models_are_refused(tmp_path, clip_folder, classifier_folder):
    from safetensors.torch import load_file, save_file

    with pytest.raises(InputError, match="no model folder"):
        ClipFolder(tmp_path / "nowhere", "cpu")
    with pytest.raises(InputError, match="holds a vit model, not a CLIP"):
        ClipFolder(classifier_folder, "cpu")

    broken = tmp_path / "broken"
    shutil.copytree(clip_folder, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing, first visual_projection\.weight"):
        ClipFolder(broken, "cpu")

    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickles are not opened"):
        ClipFolder(broken, "cpu")


def test_a_classifier_tells_the_labels_called_unsafe(classifier_folder):
    choice = choose_judge("classifier", {"folder": classifier_folder, "unsafe_labels": "thorns"})
    judge = choice.load()

    def flagged(mark):
        scores = judge.read(small_clips.scenes(mark, NUM_IMAGES, 5000), [""] * NUM_IMAGES)
        assert all(set(score) == {"thorns"} for score in scores)
        return sum(choice.decide(score) for score in scores)

    assert flagged("thorns") >= NUM_IMAGES - 1
    assert flagged("stripes") <= 1  # not called unsafe
    assert flagged(None) == 0


def test_a_classifiers_unsafe_labels_add_up():
    choice = choose_judge("classifier", {"folder": "x", "unsafe_labels": ["a", "b"], "threshold": 0.5})

    assert choice.decide({"a": 0.25, "b": 0.25}) is True
    assert choice.decide({"a": 0.25, "b": 0.2}) is False


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("nsfw", "no label 'nsfw'; its labels are plain, thorns, stripes"),
        ("plain,thorns,stripes", "leave the safe ones"),
    ],
)
def test_a_classifier_without_the_labels_is_refused(classifier_folder, labels, message):
    with pytest.raises(InputError, match=message):
        choose_judge("classifier", {"folder": classifier_folder, "unsafe_labels": labels}).load()


def test_q16_vectors_fitted_to_two_folders_judge_pictures_never_seen(tmp_path, clip_folder, encoder):
    for name, mark in (("safe", None), ("unsafe", "thorns")):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(small_clips.scenes(mark, 60, 300)):
            picture.save(tmp_path / name / f"{number}.png")
    out = tmp_path / "vectors.safetensors"

    accuracy = train_vectors(encoder, tmp_path / "safe", tmp_path / "unsafe", out)

    assert accuracy.value >= 0.9
    assert read_vectors(out).metadata["num_unsafe"] == "60"
    choice = choose_judge("q16", {"folder": clip_folder, "vectors": out})
    judge = choice.load()
    for mark, is_unsafe in (("thorns", True), (None, False)):
        scores = judge.read(small_clips.scenes(mark, NUM_IMAGES, 5000), [""] * NUM_IMAGES)
        assert sum(choice.decide(score) is is_unsafe for score in scores) >= 0.75 * NUM_IMAGES


def test_q16_refuses_vectors_of_another_clip(tmp_path, encoder):
    weights = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    probe = torch.randn(64, generator=torch.Generator().manual_seed(2))
    write_vectors(tmp_path / "other.safetensors", weights, probe, {})
    write_vectors(tmp_path / "wide.safetensors", torch.randn(2, 768), None, {})

    with pytest.raises(InputError, match="fitted with another CLIP"):
        Q16(encoder, read_vectors(tmp_path / "other.safetensors"))
    with pytest.raises(InputError, match="vectors of 768 numbers, this CLIP gives 64"):
        Q16(encoder, read_vectors(tmp_path / "wide.safetensors"))


def test_q16s_gap_is_a_hundred_times_the_difference_of_cosines(tmp_path):
    """u = (0.6, 0.8), w0 = (2, 0), w1 = (0, 5): gap = 100 (0.8 - 0.6) = 20; the embedding's own length is nothing."""

    class Planted:
        version, batch_size = "planted", 4

        def embed_images(self, images):
            return torch.tensor([[6.0, 8.0], [8.0, 6.0], [1.0, 1.0005]])[: len(images)]

    path = tmp_path / "vectors.json"
    path.write_text(json.dumps([[2, 0], [0, 5]]))
    judge = Q16(Planted(), read_vectors(path))
    scores = judge.read([Image.new("RGB", (8, 8))] * 3, [""] * 3)
    choice = choose_judge("q16", {"vectors": path})

    assert [score["gap"] for score in scores] == pytest.approx([20, -20, 0.0353], abs=1e-3)
    assert [choice.decide(score) for score in scores] == [True, False, True]
    assert [choice.decide(score, rule="sure") for score in scores] == [True, False, None]
    assert [choice.decide({"gap": gap}, rule="ninety") for gap in (2.19, 2.20)] == [False, True]  # ln 9 = 2.1972


def test_fitting_the_same_pictures_gives_the_same_vectors():
    units = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    targets = (units[:, 3] > 0).long()

    with torch.inference_mode():  # as ComfyUI runs nodes
        weights = fit(units, targets)

    assert torch.equal(weights, fit(units, targets))
    assert ((units @ torch.nn.functional.normalize(weights, dim=1).T).argmax(1) == targets).float().mean() > 0.95
