"""The judges' registry: choosing by name, options, rules; and the toy oracle as a judge."""

import pytest
from safety_experts.errors import InputError
from safety_experts.evaluation.judges import JUDGES, choose_judge, parse_judges, read_in_batches
from safety_experts.toy.world import MARKS, render_scene


@pytest.mark.parametrize("category", MARKS)
def test_the_oracle_finds_the_mark_of_its_category_alone(category):
    choice = choose_judge("toy-oracle")
    judge = choice.load()
    marked, plain = judge.read(
        [render_scene("red", "circle", MARKS[category], 1), render_scene("red", "circle", None, 1)], ["", ""]
    )

    assert marked == {name: float(name == category) for name in MARKS}
    assert set(plain.values()) == {0.0}
    assert choice.decide(marked) is True
    assert choice.decide(plain) is False


def test_a_rule_may_ask_for_the_own_category_only():
    choice = choose_judge("toy-oracle", {"rule": "own-mark"})
    (scores,) = choice.load().read([render_scene("red", "circle", MARKS["violence"], 1)], [""])

    assert choice.decide(scores, ["violence"]) is True
    assert choice.decide(scores, ["hate"]) is False
    assert choice.decide(scores, ["of-ones-own"]) is None
    assert choice.decide(scores, ["hate"], rule="any-mark") is True
    assert choice.rule_id == "toy-oracle:own-mark"


def test_an_image_that_could_not_be_judged_is_neither_safe_nor_unsafe():
    assert choose_judge("toy-oracle").decide({}) is None


def test_batches_of_any_size_give_the_same_scores():
    judge = choose_judge("toy-oracle").load()
    images = [render_scene("blue", "square", mark, seed) for seed, mark in enumerate([*MARKS.values(), None] * 5)]

    assert len(images) > judge.batch_size
    assert read_in_batches(judge, images, [""] * len(images)) == judge.read(images, [""] * len(images))


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["nobody"], [], "no judge 'nobody'; choose from classifier, "),
        (["toy-oracle", "toy-oracle"], [], "named twice"),
        (["a b=toy-oracle"], [], "use letters"),
        (["toy-oracle"], ["rule=any-mark"], "not of the form judge.option=value"),
        (["toy-oracle"], ["q16.rule=argmax"], "no judge 'q16' was asked for; there is toy-oracle"),
        (["toy-oracle"], ["toy-oracle.rule=best"], "no rule 'best'; choose from any-mark, own-mark"),
        (["toy-oracle"], ["toy-oracle.size=3"], r"unknown option 'size' \(known: rule"),
        (["toy-oracle"], ["toy-oracle.rule=[a"], "not valid YAML"),
    ],
)
def test_a_wrong_judge_is_named_in_one_line(names, settings, message):
    with pytest.raises(InputError, match=message) as error:
        parse_judges(names, settings)

    assert "\n" not in str(error.value)


def test_two_judges_of_a_kind_have_names_of_their_own():
    first, second = parse_judges(["toy-oracle", "own=toy-oracle"], ["own.rule=own-mark"])

    assert (first.rule_id, second.rule_id) == ("toy-oracle:any-mark", "own:own-mark")


@pytest.mark.parametrize("kind", JUDGES.values(), ids=JUDGES)
def test_every_judge_says_where_it_comes_from_and_what_it_needs(kind):
    assert kind.source_url.startswith("https://")
    assert all([kind.title, kind.licence, kind.summary, kind.needs, kind.rules])
    assert all(rule.summary for rule in kind.rules.values())
    assert all(field.description for field in kind.options.model_fields.values())
