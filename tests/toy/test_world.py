"""The toy world: scenes are reproducible, marks never hide what they are drawn on, prompts say what is drawn."""

import itertools

import numpy as np
import pytest
from safety_experts.errors import InputError
from safety_experts.preferences.categories import CATEGORIES
from safety_experts.preferences.taxonomy import expand_taxonomy
from safety_experts.toy import world


def test_every_safety_category_has_its_own_mark():
    assert set(world.MARKS) == set(CATEGORIES)
    assert len(set(world.MARKS.values())) == len(CATEGORIES)


def test_the_same_seed_draws_the_same_scene_and_another_seed_another():
    first, again, other = (np.asarray(world.render_scene("red", "circle", "thorns", seed)) for seed in (7, 7, 8))
    assert first.shape == (64, 64, 3)
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("mark", world.MARKS.values())
@pytest.mark.parametrize("shape", world.SHAPES)
def test_a_mark_hides_nothing_of_the_shape_and_most_of_the_mark_is_seen(mark, shape):
    plain, marked = (np.asarray(world.render_scene("blue", shape, shown, seed=6)).astype(int) for shown in (None, mark))
    changed = (plain != marked).any(axis=2)
    assert not changed[plain.max(axis=2) - plain.min(axis=2) > 180].any()
    place = world.Placement(32, 32, world.MAX_RADIUS_PX)
    assert (world.draw_mark(mark, place) * (1 - world.draw_shape(shape, place))).sum() > 100


def test_marks_overlap_little_with_one_another():
    place = world.Placement(32, 32, 13.5)
    drawn = {mark: world.draw_mark(mark, place) > 0.5 for mark in world.MARKS.values()}
    for first, second in itertools.combinations(drawn, 2):
        shared = (drawn[first] & drawn[second]).sum() / (drawn[first] | drawn[second]).sum()
        assert shared < 0.3, (first, second)


def test_the_background_is_light_and_plain():
    pixels = np.asarray(world.render_scene("blue", "square", None, seed=0))
    assert (pixels[:8] == pixels[0, 0]).all()
    assert pixels[0, 0].min() > 225


@pytest.mark.parametrize("mark", [None, *world.MARKS.values()])
def test_prompts_are_read_back(mark):
    assert world.parse_prompt(world.prompt_for("cyan", "triangle", mark)) == ("cyan", "triangle", mark)


def test_prompts_read_as_documented():
    assert world.prompt_for("red", "circle") == "a red circle"
    assert world.prompt_for("red", "circle", "thorns") == "a red circle with thorns"
    assert world.prompt_for("red", "circle", "cross") == "a red circle with a cross"


@pytest.mark.parametrize("prompt", ["", "a circle", "a red blue circle", "a red circle with a ring and thorns"])
def test_a_prompt_of_another_world_is_refused(prompt):
    with pytest.raises(InputError, match="no prompt of the toy world"):
        world.parse_prompt(prompt)


def test_an_unknown_mark_or_shape_is_refused_by_name():
    with pytest.raises(InputError, match=r"'hole'.*thorns"):
        world.render_scene("red", "circle", "hole", 0)
    with pytest.raises(InputError, match=r"'cube'.*circle"):
        world.render_scene("red", "cube", None, 0)


def test_the_taxonomy_expands_to_marked_and_plain_prompts():
    pairs = expand_taxonomy(world.taxonomy(["violence", "shocking"], pairs_per_category=10))
    assert len(pairs) == 20
    for pair in pairs:
        colour, shape, mark = world.parse_prompt(pair.prompt)
        assert world.parse_prompt(pair.safe_prompt) == (colour, shape, None)
        assert pair.categories == ({"thorns": "violence", "ring": "shocking"}[mark],)


def test_the_whole_taxonomy_covers_every_scene_with_a_mark():
    prompts = {pair.prompt for pair in expand_taxonomy(world.taxonomy())}
    assert len(prompts) == len(world.COLOURS) * len(world.SHAPES) * len(world.MARKS)


def test_a_category_without_a_mark_is_refused():
    with pytest.raises(InputError, match="'spam'"):
        world.taxonomy(["spam"])
