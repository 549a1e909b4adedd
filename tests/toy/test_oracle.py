"""The oracle against scenes whose content is known, clean and degraded as an autoencoder would."""

import random

import numpy as np
import pytest
from PIL import Image, ImageFilter
from safety_experts.toy import world
from safety_experts.toy.oracle import Reading, read_image


def _scenes(count, seed):
    draws = random.Random(seed)
    for index in range(count):
        label = (
            draws.choice(list(world.COLOURS)),
            draws.choice(world.SHAPES),
            draws.choice([None, *world.MARKS.values()]),
        )
        yield label, world.render_scene(*label, seed=seed + index)


def _degrade(image, seed):
    noise = np.random.default_rng(seed).normal(0, 10, (world.SIZE_PX, world.SIZE_PX, 3))
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.9)), dtype=float)
    return Image.fromarray(np.clip(blurred + noise, 0, 255).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("degrade", [lambda image, seed: image, _degrade], ids=["clean", "blurred_and_noisy"])
def test_at_least_99_percent_of_renders_are_read_right(degrade):
    wrong = [
        (label, reading)
        for index, ((colour, shape, mark), image) in enumerate(_scenes(200, seed=1000))
        if (reading := read_image(degrade(image, index))) != Reading(mark, colour, shape)
        for label in [(colour, shape, mark)]
    ]
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize("radius_px", [None, 17.0])
def test_every_mark_on_every_shape_is_read(radius_px):
    for shape in world.SHAPES:
        for mark in world.MARKS.values():
            image = world.render_scene("blue", shape, mark, seed=5, radius_px=radius_px)
            assert read_image(image) == Reading(mark, "blue", shape)


def test_a_larger_picture_is_read_too():
    image = world.render_scene("pink", "diamond", "thorns", seed=3).resize((256, 256))
    assert read_image(image) == Reading("thorns", "pink", "diamond")


@pytest.mark.parametrize("mark", world.MARKS.values())
@pytest.mark.parametrize(("share", "is_found"), [(0.15, False), (0.85, True)])
def test_remnants_of_a_mark_are_no_mark_and_most_of_one_still_is(mark, share, is_found):
    plain, marked = (np.array(world.render_scene("green", "circle", shown, seed=9)) for shown in (None, mark))
    # Bring the mark into the plain picture in small squares, in an order that mixes the places.
    squares = sorted({(row // 4, column // 4) for row, column in np.argwhere((plain != marked).any(axis=2))})
    random.Random(1).shuffle(squares)
    for row, column in squares[: round(share * len(squares))]:
        window = (slice(row * 4, row * 4 + 4), slice(column * 4, column * 4 + 4))
        plain[window] = marked[window]
    assert read_image(Image.fromarray(plain)).mark == (mark if is_found else None)


def test_noise_a_blank_and_a_black_picture_read_as_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for picture in (noise, np.full((64, 64, 3), 245, np.uint8), np.zeros((64, 64, 3), np.uint8)):
        assert read_image(Image.fromarray(picture)) == Reading(None, None, None)


def test_a_patchwork_of_colours_has_no_colour_but_keeps_its_shape():
    red, blue = (np.asarray(world.render_scene(colour, "square", None, seed=4)) for colour in ("red", "blue"))
    halves = np.concatenate([red[:, :32], blue[:, 32:]], axis=1)
    assert read_image(Image.fromarray(halves)) == Reading(None, None, "square")


def test_a_grey_shape_has_neither_colour_nor_shape():
    grey = world.render_scene("red", "circle", "ring", seed=1).convert("L")
    reading = read_image(grey)
    assert (reading.colour, reading.shape) == (None, None)
