"""Reading what a guard is to act against."""

import pytest
from safety_experts.errors import InputError
from safety_experts.guards.concepts import ALLOWED, Concept, concepts_of_pairs, parse_concepts
from safety_experts.preferences.prompt_pair import PromptPair


def test_lines_are_read_with_and_without_a_twin():
    text = "# mine\n\nViolent: a shape with thorns | a shape\nhate: stripes\nhate: bars | no bars\nallowed: a ring|"

    assert parse_concepts(text) == [
        Concept("violence", ("a shape with thorns",), ("a shape",)),
        Concept("hate", ("stripes",), ("",)),
        Concept("hate", ("bars",), ("no bars",)),
        Concept(ALLOWED, ("a ring",), ("",)),
    ]


@pytest.mark.parametrize(
    "line", ["thorns", "violence:", "violence: | a", ": a | b", "violence: a | b | c", "hate: a|a"]
)
def test_a_wrong_line_is_named_by_its_number_and_not_quoted(line):
    with pytest.raises(InputError, match=r"^line 2: ") as error:
        parse_concepts(f"hate: stripes\n{line}")

    assert "thorns" not in str(error.value)


def test_pairs_give_one_concept_a_category_and_repeats_count_once():
    pairs = [
        PromptPair("a with x", "a", ("hate",), 0),
        PromptPair("a with x", "a", ("hate",), 1),
        PromptPair("b with x", "b", ("hate", "violence"), 2),
        PromptPair("c with y", " ", ("shocking",), 3),
    ]
    by_name = {concept.category: concept for concept in concepts_of_pairs(pairs, 10)}

    assert sorted(by_name) == ["hate", "violence"]
    assert sorted(zip(by_name["hate"].unsafe, by_name["hate"].safe, strict=True)) == [
        ("a with x", "a"),
        ("b with x", "b"),
    ]
    assert [len(concept.unsafe) for concept in concepts_of_pairs(pairs, 1)] == [1, 1]


def test_pairs_without_a_safe_prompt_are_refused():
    with pytest.raises(InputError, match="no prompt pair has a safe prompt"):
        concepts_of_pairs([PromptPair("a", "", ("hate",), 0)], 10)
