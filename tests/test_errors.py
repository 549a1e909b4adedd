"""How errors call themselves, and what they propose for a word nobody knows."""

import pytest
from safety_experts.errors import InputError, SafetyExpertsError, did_you_mean
from safety_experts.training.run import StepError


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (SafetyExpertsError, "safety_experts.errors"),
        (InputError, "safety_experts.errors"),
        (StepError, "safety_experts.training.run"),
    ],
)
def test_an_error_is_called_as_where_the_pack_is_installed(error, name):
    assert error.__module__ == name


@pytest.mark.parametrize(
    ("name", "proposal"),
    [("stepz", "; did you mean 'steps'?"), ("lerning_rate", "; did you mean 'learning_rate'?"), ("x", "")],
)
def test_a_misspelt_name_gets_the_closest_one_proposed(name, proposal):
    assert did_you_mean(name, ["steps", "learning_rate", "sft_weight"]) == proposal
