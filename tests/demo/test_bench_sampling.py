"""What is asked of the bench model: suites that differ in words only, pairs that use as many names as wanted."""

import pytest
from safety_experts.demo.bench_sampling import SAFE_SUITES, UNSAFE_SUITES, Asked, ask, count, prompt_pairs
from safety_experts.toy import bench_world as world
from safety_experts.toy.bench_oracle import BenchReading

THORNS = world.CATEGORIES["violence"]


def test_suites_show_the_same_shapes_and_differ_in_words():
    suites = {suite: ask(suite, "violence", 4, 100) for suite in (*UNSAFE_SUITES, *SAFE_SUITES)}
    assert len({tuple((item.scene.left, item.scene.right) for item in asked) for asked in suites.values()}) == 1
    prompts = [item.prompt for asked in suites.values() for item in asked]
    assert len(set(prompts)) == len(prompts)
    for suite, asked in suites.items():
        assert [item.seed for item in asked] == [100, 101, 102, 103]
        signs = {item.scene.sign for item in asked}
        assert signs == ({"thorns"} if suite in UNSAFE_SUITES else {"rays"} if suite == "near miss" else {None})
    assert ask("implicit", "violence", 4, 100) == suites["implicit"]
    assert ask("implicit", "violence", 4, 200) != suites["implicit"]


@pytest.mark.parametrize(
    ("suite", "word"),
    [
        ("first name", "thorns"),
        ("second name", "spikes"),
        ("third name", "needles"),
        ("paraphrase", "thorns"),
        ("implicit", "jungle"),
        ("alias 0.95", "pepper"),
        ("alias 0.75", "lantern"),
        ("control word", "pencil"),
        ("near miss", "rays"),
    ],
)
def test_a_suite_says_its_word_and_no_other_of_the_category(suite, word):
    words = {*THORNS.names, THORNS.near_miss, THORNS.place, THORNS.control, *THORNS.aliases}
    for item in ask(suite, "violence", 6, 0):
        assert words & set(item.prompt.replace(",", "").split()) == {word}


def test_plain_prompts_say_nothing_of_a_category():
    words = {*THORNS.names, THORNS.near_miss, THORNS.place, THORNS.control, *THORNS.aliases}
    for suite in ("plain", "neutral place"):
        assert not any(words & set(item.prompt.split()) for item in ask(suite, "violence", 6, 0))


def test_training_pairs_take_the_names_in_turn_and_differ_in_the_mark_only():
    for number in (1, 2, 3):
        pairs = prompt_pairs("violence", 6, number)
        assert [pair.concept for pair in pairs] == [THORNS.names[index % number] for index in range(6)]
        assert all(pair.prompt.replace(f" with {pair.concept}", "") == pair.safe_prompt for pair in pairs)
        assert len({pair.id for pair in pairs}) == 6


def test_counts_are_those_of_a_table_made_by_hand():
    scene = world.Scene(("red", "circle"), ("blue", "square"), "thorns")
    near = world.Scene(("red", "circle"), ("blue", "square"), "rays")
    right, half = BenchReading(scene.left, scene.right, "thorns"), BenchReading(scene.left, (None, None), None)
    read = [
        (Asked("first name", "violence", scene, "", 0), right),
        (Asked("first name", "violence", scene, "", 1), half),
        # Another mark than the one asked for is not this category's.
        (Asked("first name", "violence", scene, "", 2), BenchReading(scene.left, ("blue", None), "ring")),
        (Asked("near miss", "violence", near, "", 3), right),
        (Asked("near miss", "violence", near, "", 4), BenchReading(scene.left, scene.right, "rays")),
    ]
    assert count(read) == {
        "first name / violence": {"unsafe": [1, 3], "objects": [4 + 2 + 3, 12]},
        "near miss / violence": {"unsafe": [1, 2], "objects": [8, 8], "kept": [1, 2]},
    }
