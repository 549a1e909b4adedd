"""Which concept is found in an image, and when."""

import torch
from safety_experts.guards.evidence import Evidence

SIGMAS = [9.0, 6.0, 4.0, 2.0, 1.0, 0.5, 0.0]  # six steps: two decide at a third
BOTH = torch.tensor([[True, True]])


def test_the_mean_of_the_deciding_steps_decides_and_the_largest_acts():
    evidence = Evidence(SIGMAS, 1 / 3, 0.25)
    evidence.add(9.0, torch.tensor([[0.2, 0.0], [0.4, 0.9], [0.5, -0.5]]))
    assert not evidence.is_decided(9.0)
    assert evidence.chosen(BOTH).tolist() == [-1, 1, 0]

    evidence.add(6.0, torch.tensor([[0.4, 0.1], [0.4, 0.0], [-0.1, -0.5]]))
    assert not evidence.is_decided(6.0)
    assert evidence.chosen(BOTH).tolist() == [0, 1, -1]  # means .3 .05, .4 .45, .2 -.5
    assert evidence.is_decided(4.0)


def test_what_may_not_act_stays_closed():
    evidence = Evidence(SIGMAS, 1 / 3, 0.25)
    evidence.add(9.0, torch.tensor([[0.4, 0.9], [0.1, 0.9]]))

    assert evidence.chosen(torch.tensor([[True, False]])).tolist() == [0, -1]


def test_a_nearer_concept_that_is_allowed_keeps_it_closed():
    """Two images: the mean distances of the concept are .3 and .4, those of the allowed one .35 and .25."""
    evidence = Evidence(SIGMAS, 1 / 3, 0.25, [False, True])
    presences = torch.tensor([[0.5, 0.9], [0.5, 0.1]])
    evidence.add(9.0, presences, torch.tensor([[0.2, 0.5], [0.2, 0.4]]))
    assert evidence.chosen(BOTH).tolist() == [0, 0]
    evidence.add(6.0, presences, torch.tensor([[0.4, 0.2], [0.6, 0.1]]))

    assert evidence.chosen(BOTH).tolist() == [0, -1]
    assert evidence.chosen(torch.tensor([[False, True]])).tolist() == [-1, -1]


def test_a_noise_level_that_is_seen_twice_counts_once():
    evidence = Evidence(SIGMAS, 1 / 3, 0.25)
    for sigma, value in ((9.0, 0.0), (6.0, 0.9), (6.0, 0.6)):
        evidence.add(sigma, torch.tensor([[value]]))

    assert torch.allclose(evidence.means(), torch.tensor([[0.3]]))


def test_a_sampling_of_one_step_decides_at_once():
    evidence = Evidence([9.0, 0.0], 1 / 3, 0.25)
    assert not evidence.is_decided(9.0)
    evidence.add(9.0, torch.tensor([[0.6]]))

    assert evidence.chosen(torch.tensor([[True]])).tolist() == [0]


def test_a_decision_is_not_taken_back_when_noise_is_added_again():
    evidence = Evidence(SIGMAS, 1 / 3, 0.25)
    evidence.add(9.0, torch.tensor([[0.6]]))
    assert evidence.is_decided(4.0)
    assert evidence.is_decided(9.0)
