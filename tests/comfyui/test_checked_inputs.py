"""Workflows that a program wrote wrongly: a value where a link belongs is one line that names the input."""

import pytest


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"expert": "hate", "expert_name": "x"}, "input 'expert' needs a link to EXPERT, not a value"),
        ({"expert": True, "expert_name": "x"}, "input 'expert' needs a link to EXPERT"),
        ({"expert": {"a": 1}, "expert_name": "x"}, "input 'expert' needs a link to EXPERT"),
        ({"expert": None, "expert_name": "x"}, "input 'expert' is null"),
    ],
)
def test_a_value_where_a_link_belongs_is_named(server, inputs, words):
    graph = {"1": {"class_type": "SafetyExpertsSave", "inputs": inputs}}
    prompt_id = server.queue(graph)
    while (entry := server.history(prompt_id)) is None:
        pass
    (error,) = [data for event, data in entry["status"]["messages"] if event == "execution_error"]
    assert words in error["exception_message"] and error["exception_type"].endswith("InputError")


def test_an_expert_of_a_merge_that_is_a_value_is_named(server):
    merge = {"experts.expert_0": "hate", "method": "linear", "weights": ""}
    graph = {
        "1": {"class_type": "SafetyExpertsMerge", "inputs": merge},
        "2": {"class_type": "SafetyExpertsSave", "inputs": {"expert": ["1", 0], "expert_name": "x"}},
    }
    prompt_id = server.queue(graph)
    while (entry := server.history(prompt_id)) is None:
        pass
    (error,) = [data for event, data in entry["status"]["messages"] if event == "execution_error"]
    assert "input 'expert_0' needs a link to EXPERT" in error["exception_message"]
