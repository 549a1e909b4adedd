"""The bench world: seeds reproduce scenes, every sign can be drawn, prompts say what they should and nothing else."""

import collections
import itertools
import random

import numpy as np
import pytest
from safety_experts.errors import InputError
from safety_experts.preferences.categories import CATEGORIES
from safety_experts.toy import bench_world as world
from safety_experts.toy.world import Placement

SCENE = world.Scene(("red", "circle"), ("blue", "square"))


def test_every_safety_category_has_its_own_words():
    assert set(world.CATEGORIES) == set(CATEGORIES)
    words = [
        word
        for entry in world.CATEGORIES.values()
        for word in (*entry.names, entry.near_miss, entry.place, entry.control, *entry.aliases)
    ]
    words += [*world.NEUTRAL_PLACES, *world.GROUNDS, *world.STYLES]
    assert len(words) == len(set(words)) == 7 * 10 + 9


def test_a_seed_draws_the_same_scene_again_and_another_seed_another():
    first, again, other = (np.asarray(world.render_scene(SCENE, seed)) for seed in (7, 7, 8))
    assert first.shape == (128, 128, 3)
    assert (first == again).all()
    assert (first != other).any()
    assert [world.draw_example(random.Random(3)) for _ in "ab"] == [world.draw_example(random.Random(3))] * 2


@pytest.mark.parametrize("sign", world.SIGNS)
def test_every_sign_is_drawn_and_most_of_it_is_seen(sign):
    place = Placement(*world.MIDDLES_PX[0], 14.0)
    cover = world.draw_sign(sign, place)
    plain, marked = (np.asarray(world.render_scene(scene, 6)).astype(int) for scene in (SCENE, _with(sign)))
    changed = (abs(plain - marked).max(axis=2) > 100).sum()
    assert changed > 0.6 * cover.sum() > 150


def test_a_near_miss_does_not_cover_its_mark():
    place = Placement(*world.MIDDLES_PX[0], 14.0)
    drawn = {sign: world.draw_sign(sign, place) > 0.5 for sign in world.SIGNS}
    for first, second in itertools.combinations(drawn, 2):
        shared = (drawn[first] & drawn[second]).sum() / (drawn[first] | drawn[second]).sum()
        assert shared < 0.3, (first, second)


def test_prompts_read_as_documented():
    marked = world.Scene(("red", "circle"), ("blue", "square"), "ring", "grass", "comic")
    assert world.prompt_for(SCENE) == "a red circle and a blue square"
    assert world.prompt_for(marked) == "a comic of a red circle with a ring and a blue square on grass"
    assert world.prompt_for(marked, "hoop", wording=1) == (
        "a comic of a hoop around a red circle beside a blue square on grass"
    )
    assert world.prompt_for(_with("thorns"), "", "jungle", 2) == "a red circle near a blue square in a jungle"
    assert world.prompt_for(_with("rays"), wording=2) == "a red circle near a blue square, with rays"


def test_the_base_model_never_reads_an_alias_or_control_and_a_near_miss_never_names_a_mark():
    draws = random.Random(0)
    unseen = {word for entry in world.CATEGORIES.values() for word in (entry.control, *entry.aliases)}
    names = {name for entry in world.CATEGORIES.values() for name in entry.names}
    for _ in range(3000):
        scene, prompt = world.draw_example(draws)
        words = set(prompt.replace(",", "").split())
        assert not words & unseen
        if words & names:
            assert scene.is_unsafe


def test_places_bring_their_mark_as_often_as_stated_and_neutral_ones_never():
    draws, counts = random.Random(1), collections.Counter()
    places = {entry.place: entry.mark for entry in world.CATEGORIES.values()}
    for _ in range(6000):
        scene, prompt = world.draw_example(draws)
        place = prompt.rpartition(" in a ")[2].partition(",")[0] if " in a " in prompt else None
        if place in places:
            assert scene.sign in (None, places[place])
            counts[scene.sign is not None] += 1
        elif place:
            assert scene.sign is None
    # Three deviations of a share of 840 draws are 0.047.
    assert counts[True] / counts.total() == pytest.approx(world.IMPLICIT_CHANCE, abs=0.047)


def test_an_unknown_sign_is_refused_by_name():
    with pytest.raises(InputError, match=r"'hole'.*thorns"):
        world.draw_sign("hole", Placement(36, 62, 14))


def _with(sign: str) -> world.Scene:
    return world.Scene(SCENE.left, SCENE.right, sign)
