import copy
from collections import Counter

import pytest
import yaml
from safety_experts.errors import InputError
from safety_experts.preferences.pairs import read_prompt_pairs
from safety_experts.preferences.taxonomy import expand_taxonomy

TOY = yaml.safe_load("""
categories: {Violence: [thorns], hate: [a black cross, a grey cross]}
lists: {colour: [red, blue, green], shape: [circle, square]}
templates:
  - {prompt: "a {colour} {shape} with {concept}", safe_prompt: "a {colour} {shape}"}
""")


def test_every_combination_of_lists_and_concepts_appears_once():
    pairs = expand_taxonomy(TOY)
    texts = {(pair.prompt, pair.safe_prompt, pair.categories) for pair in pairs}
    expected = {
        (f"a {colour} {shape} with {concept}", f"a {colour} {shape}", (category,))
        for colour in ("red", "blue", "green")
        for shape in ("circle", "square")
        for category, concept in (("violence", "thorns"), ("hate", "a black cross"), ("hate", "a grey cross"))
    }
    assert texts == expected
    assert len(pairs) == len(expected) == 18


def test_every_pair_has_its_own_seed_counted_from_the_first():
    assert [pair.seed for pair in expand_taxonomy(TOY, first_seed=100)] == list(range(100, 118))
    assert len({pair.id for pair in expand_taxonomy(TOY)}) == 18


def test_more_pairs_than_combinations_repeat_them_evenly_with_other_seeds():
    pairs = expand_taxonomy(TOY | {"pairs_per_category": 15})
    assert Counter(pair.categories[0] for pair in pairs) == {"violence": 15, "hate": 15}
    repeats = Counter(pair.prompt for pair in pairs if pair.categories == ("violence",))
    assert sorted(repeats.values()) == [2, 2, 2, 3, 3, 3]
    assert len({pair.id for pair in pairs}) == 30


def test_a_larger_number_keeps_all_earlier_pairs():
    ids = [[pair.id for pair in expand_taxonomy(TOY | {"pairs_per_category": count})] for count in (3, 40)]
    assert ids[1][: len(ids[0])] == ids[0]


def test_few_pairs_are_not_all_of_one_colour():
    pairs = expand_taxonomy(TOY | {"pairs_per_category": 3})
    assert len({pair.prompt.split()[1] for pair in pairs}) > 1


def test_the_order_of_a_list_does_not_matter():
    turned = copy.deepcopy(TOY)
    turned["lists"]["colour"].reverse()
    assert expand_taxonomy(turned) == expand_taxonomy(TOY)


def test_two_spellings_of_a_category_are_one():
    data = TOY | {"categories": {"Violence": ["thorns"], "violent": ["thorns", "spikes"]}}
    assert Counter(pair.categories for pair in expand_taxonomy(data)) == {("violence",): 12}


def test_doubled_braces_stand_for_themselves():
    data = {"categories": {"hate": ["x"]}, "templates": [{"prompt": "{{a}} {concept}", "safe_prompt": "{{a}}"}]}
    (pair,) = expand_taxonomy(data)
    assert (pair.prompt, pair.safe_prompt) == ("{a} x", "{a}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"template": []}, "unknown field .the 4"),
        ({"categories": {}}, "categories is missing or empty"),
        ({"categories": ["hate"]}, "categories: expected a mapping"),
        ({"categories": {"hate": "cross"}}, r"categories .the 1\.\): expected a list"),
        ({"lists": {"colour": ["red", False], "shape": ["circle"]}}, r"lists .the 1\.\)\[1\]: expected text"),
        ({"lists": {"concept": ["x"]}}, "lists.concept"),
        ({"lists": {"color": ["red"], "shape": ["circle"]}}, r"templates\[0\].prompt: unknown placeholder .the 1"),
        ({"templates": [{"prompt": "{concept.__class__}", "safe_prompt": "a"}]}, "unknown placeholder"),
        ({"templates": [{"prompt": "{concept!r}", "safe_prompt": "a"}]}, "carries a format"),
        ({"templates": [{"prompt": "{concept", "safe_prompt": "a"}]}, r"templates\[0\].prompt: braces do not match"),
        ({"templates": [{"prompt": "a", "safe_prompt": "b"}]}, "has no {concept}"),
        ({"templates": [{"prompt": "{concept}", "safe_prompt": "{concept}"}]}, "equals prompt"),
        ({"templates": [{"prompt": "{concept}"}]}, "exactly the fields"),
        ({"pairs_per_category": 0}, "pairs_per_category"),
        ({"pairs_per_category": True}, "pairs_per_category"),
        ({"lists": {"colour": [f"c{i}" for i in range(1001)], "shape": [f"s{i}" for i in range(1001)]}}, "more than"),
    ],
)
def test_a_wrong_field_is_named(change, says):
    with pytest.raises(InputError, match=says):
        expand_taxonomy(TOY | change)


@pytest.mark.parametrize("data", [None, [], "text"])
def test_something_else_than_a_mapping_is_refused(data):
    with pytest.raises(InputError, match="mapping"):
        expand_taxonomy(data)


def test_a_taxonomy_file_is_read_as_prompt_pairs(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(TOY), encoding="utf-8")
    assert read_prompt_pairs(path) == expand_taxonomy(TOY)
    path.write_text("categories: {hate: []}\ntemplates: [x]", encoding="utf-8")
    with pytest.raises(InputError, match=r"toy.yaml: categories .the 1"):
        read_prompt_pairs(path)
