"""What ComfyUI answers when a workflow is refused or fails, in one line each."""

from collections.abc import Iterable
from typing import Any

from ..errors import InputError, SafetyExpertsError


def describe_refusal(answer: dict[str, Any]) -> str:
    """Name each node that POST /prompt complains about and what is wrong with it."""
    problems = [
        f"node {node_id} ({node['class_type']}): {problem['message']}: {problem['details']}"
        for node_id, node in (answer.get("node_errors") or {}).items()
        for problem in node["errors"]
    ]
    if not problems:
        error = answer.get("error") or {}
        problems = [f"{error.get('message', 'no reason given')} {error.get('details', '')}"]
    return _one_line("; ".join(problems))


class InterruptedWorkflowError(SafetyExpertsError):
    """A workflow was cancelled."""


def failure_of(messages: Iterable[tuple[str, dict[str, Any]]]) -> SafetyExpertsError:
    """Return which node failed or was interrupted as an error, from the status messages of a history entry.

    An error of this pack is the one that its node raised, in the node's own words.
    """
    for kind, data in messages:
        if kind == "execution_interrupted":
            node = f"node {data['node_id']} ({data['node_type']})"
            return InterruptedWorkflowError(f"the workflow was interrupted at {node}")
        if kind == "execution_error":
            text = _one_line(data["exception_message"])
            if data.get("exception_type") == f"{InputError.__module__}.{InputError.__qualname__}":
                return InputError(text)
            if str(data.get("exception_type")).startswith("safety_experts."):
                return SafetyExpertsError(text)
            return SafetyExpertsError(f"node {data['node_id']} ({data['node_type']}) failed: {text}")
    return SafetyExpertsError("the workflow failed, and ComfyUI gave no reason")


def _one_line(text: str) -> str:
    return " ".join(text.split())
