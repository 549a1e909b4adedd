"""What ComfyUI answers when a workflow is refused or fails, in one line each."""

from collections.abc import Iterable
from typing import Any


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


def describe_failure(messages: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """Say which node failed or was interrupted, from the status messages of a history entry."""
    for kind, data in messages:
        if kind == "execution_interrupted":
            return f"the workflow was interrupted at node {data['node_id']} ({data['node_type']})"
        if kind == "execution_error":
            return _one_line(f"node {data['node_id']} ({data['node_type']}) failed: {data['exception_message']}")
    return "the workflow failed, and ComfyUI gave no reason"


def _one_line(text: str) -> str:
    return " ".join(text.split())
