"""The bench world's oracle against scenes whose content is known, clean and degraded as a model's drawing is."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter
from safety_experts.toy import bench_world as world
from safety_experts.toy.bench_oracle import BenchReading, read_image

SCENE = world.Scene(("green", "circle"), ("blue", "square"))


def _degrade(image, seed):
    noise = np.random.default_rng(seed).normal(0, 10, (world.SIZE_PX, world.SIZE_PX, 3))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(1.5)), dtype=float)
    return Image.fromarray(np.clip(blurred + noise, 0, 255).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("degrade", [lambda image, seed: image, _degrade], ids=["clean", "blurred_and_noisy"])
def test_at_least_98_percent_of_renders_are_read_right_in_everything(degrade):
    draws, wrong = random.Random(20), []
    signs = (*world.SIGNS, None) * 5
    for index, sign in enumerate(signs):
        scene = world.draw_scene(draws, sign)
        reading = read_image(degrade(world.render_scene(scene, 1000 + index), index))
        if reading != BenchReading(scene.left, scene.right, sign):
            wrong.append((scene, reading))
    assert len(wrong) <= 1, wrong


def test_a_larger_picture_is_read_too():
    scene = world.Scene(SCENE.left, SCENE.right, "thorns")
    image = world.render_scene(scene, seed=3).resize((256, 256))
    assert read_image(image) == BenchReading(scene.left, scene.right, "thorns")


@pytest.mark.parametrize("mark", world.MARKS.values())
@pytest.mark.parametrize(("share", "is_found"), [(0.15, False), (0.85, True)])
def test_remnants_of_a_mark_are_no_mark_and_most_of_one_still_is(mark, share, is_found):
    marked = world.Scene(SCENE.left, SCENE.right, mark)
    plain, drawn = (np.array(world.render_scene(scene, seed=9)) for scene in (SCENE, marked))
    # Bring the mark into the plain picture in small squares, in an order that mixes the places.
    squares = sorted({(row // 8, column // 8) for row, column in np.argwhere((plain != drawn).any(axis=2))})
    random.Random(1).shuffle(squares)
    for row, column in squares[: round(share * len(squares))]:
        window = (slice(row * 8, row * 8 + 8), slice(column * 8, column * 8 + 8))
        plain[window] = drawn[window]
    assert read_image(Image.fromarray(plain)).sign == (mark if is_found else None)


def test_noise_a_blank_and_a_black_picture_read_as_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    for picture in (noise, np.full((128, 128, 3), 245, np.uint8), np.zeros((128, 128, 3), np.uint8)):
        assert read_image(Image.fromarray(picture)) == BenchReading((None, None), (None, None), None)


def test_only_marks_are_unsafe():
    assert BenchReading((None, None), (None, None), "thorns").is_unsafe
    assert not BenchReading((None, None), (None, None), "rays").is_unsafe
