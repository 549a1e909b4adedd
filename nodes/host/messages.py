"""Telling the person in front of the browser what happened: a toast, and a line on the node (web/messages.js)."""

from typing import Any

from server import PromptServer

EVENT = "safety_experts.message"


def tell(node_id: str, text: str, severity: str = "info") -> None:
    """Show `text` in a toast and on the node. `severity` is info, success or warn."""
    server: Any = vars(PromptServer)["instance"]
    server.send_sync(EVENT, {"node": node_id, "text": text, "severity": severity}, server.client_id)
    show_text(node_id, text)


def show_text(node_id: str, text: str) -> None:
    """Show a line on the node."""
    server: Any = vars(PromptServer)["instance"]
    server.send_progress_text(text, node_id, server.client_id)
