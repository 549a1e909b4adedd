"""What a failed workflow becomes: the node's own sentence and kind of error, or one that names the node."""

import pytest
from safety_experts.demo.comfyui_messages import InterruptedWorkflowError, failure_of
from safety_experts.errors import InputError, SafetyExpertsError
from safety_experts.training.trainer import TrainingStoppedError

NODE = {"node_id": "3", "node_type": "SafetyExpertsTrain", "exception_message": "vae is not\n connected"}


@pytest.mark.parametrize(
    ("kind", "data", "expected", "text"),
    [
        ("execution_error", {"exception_type": "safety_experts.errors.InputError"}, InputError, "vae is not connected"),
        (
            "execution_error",
            {"exception_type": f"{TrainingStoppedError.__module__}.TrainingStoppedError"},
            SafetyExpertsError,
            "vae is not connected",
        ),
        (
            "execution_error",
            {"exception_type": "RuntimeError"},
            SafetyExpertsError,
            "node 3 (SafetyExpertsTrain) failed: vae is not connected",
        ),
        (
            "execution_interrupted",
            {},
            InterruptedWorkflowError,
            "the workflow was interrupted at node 3 (SafetyExpertsTrain)",
        ),
    ],
)
def test_a_failure_keeps_its_kind_and_its_words(kind, data, expected, text):
    error = failure_of([("execution_start", {}), (kind, NODE | data)])
    assert type(error) is expected and str(error) == text
