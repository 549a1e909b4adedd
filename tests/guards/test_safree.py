"""SAFREE's projections by hand, in three dimensions: the first is what all states share, the third the concept."""

import math

import pytest
import torch
from safety_experts.guards.safree import basis, onto, published, repaired

CONCEPT = torch.tensor([[0.0, 0.0, 1.0]])


def _rows(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_a_space_is_what_vectors_span_however_many_there_are():
    space = basis(_rows([2, 0, 0], [4, 0, 0], [1, 1, 0]))

    assert space.shape == (2, 3)
    torch.testing.assert_close(onto(space, _rows([5, 6, 7])), _rows([5, 6, 0]))


def test_published_triggers_are_the_words_whose_loss_leads_away_from_the_concept():
    """d = |(x, y)| of m: 1, 1 and 2, against means of the others 1.5, 1.5 and 1: the third word. P_I is everything."""
    without = _rows([1, 0, 1], [0, 1, 1], [2, 0, 0])
    states = _rows([1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 2, 3], [1, 1, 2], [9, 9, 9])
    edited = published(states, without, CONCEPT)

    assert edited.words == (2,)
    torch.testing.assert_close(edited.states[3], torch.tensor([1.0, 2.0, 0.0]))
    keep = [0, 1, 2, 4, 5]
    torch.testing.assert_close(edited.states[keep], states[keep])
    cosines = [math.sqrt(2 / 3), math.sqrt(1 / 2), math.sqrt(1 / 2), math.sqrt(5 / 14), math.sqrt(2 / 6)]
    beta = 1 - sum(cosines) / 5
    assert edited.until == (round(10 / (1 + math.exp(-5 * (10 * beta - 5.333)))) + 1) / 50


def test_published_projects_into_the_space_of_the_prompt_first():
    """Without a word that leaves the plane x = y, P_I is that plane; the row (1, 3, 5) becomes (2, 2, 0)."""
    without = _rows([1, 1, 4], [2, 2, 0])
    edited = published(_rows([1, 1, 1], [0, 0, 1], [1, 3, 5], [1, 1, 1]), without, CONCEPT)

    assert edited.words == (1,)
    torch.testing.assert_close(edited.states[2], torch.tensor([2.0, 2.0, 0.0]))


def test_where_no_word_has_to_do_with_the_concept_published_finds_one_and_repaired_does_not():
    without = _rows([5, 1, 0], [5, 2, 0])
    states, empty = _rows([5, 0, 0], [5, 1, 0], [5, 2, 0], [5, 3, 0]), _rows(*[[5, 0, 0]] * 4)
    assert published(states, without, CONCEPT).words == (1,)

    edited = repaired(states, empty, _rows([5, 3, 0])[0], without, _rows([5, 0, 1]), _rows([5, 0, 0]))
    assert edited.words == () and torch.equal(edited.states, states)


@pytest.mark.parametrize(("share", "words", "second"), [(0.5, (2,), 2.0), (0.2, (1, 2), 0.0)])
def test_repaired_takes_the_concept_out_from_the_first_word_that_carries_it(share, words, second):
    """The words add (0, 1, 0), (0, 1, .5) and (0, 1, 2): parts 0, 1/5 and 4/5. What is shared (5, 0, 0) stays."""
    whole, without = _rows([5, 3, 2.5])[0], _rows([5, 2, 2.5], [5, 2, 2], [5, 2, 0.5])
    states = _rows([5, 0, 0], [5, 1, 0], [5, 2, 2], [5, 3, 2], [5, 3, 3], [4, 3, 4])
    empty = _rows(*[[5, 0, 0]] * 5, [4, 0, 1])
    edited = repaired(states, empty, whole, without, _rows([5, 0, 1]), _rows([5, 0, 0]), share)

    assert edited.words == words and edited.until == 1.0
    expected = _rows([5, 0, 0], [5, 1, 0], [5, 2, second], [5, 3, 0], [5, 3, 0], [4, 3, 1])
    torch.testing.assert_close(edited.states, expected)
