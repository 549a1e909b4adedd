"""Looking up in the queued graph which seed drew an image."""

from collections.abc import Mapping
from typing import Any

_SEED_INPUTS = ("seed", "noise_seed")
_VALUE_INPUTS = (*_SEED_INPUTS, "value", "int")  # what nodes that hold a whole number call it


def seed_behind(graph: Mapping[str, Any], node_id: str, input_name: str) -> int | None:
    """Return the seed of the sampler nearest to an input, or None where none is found, or no single one.

    Args:
        graph: in API format, node id -> {"class_type", "inputs"}; a link is [node id, output index].
        node_id, input_name: the input, for instance an IMAGE.
    """
    level = _links(graph[node_id]["inputs"].get(input_name))
    seen: set[str] = set()
    while level:
        nodes = [graph[link]["inputs"] for link in level if link in graph]
        given = [node[name] for node in nodes for name in _SEED_INPUTS if name in node]
        if given:
            seeds = {_number(graph, value) for value in given}
            return seeds.pop() if len(seeds) == 1 else None
        seen |= level
        level = {link for node in nodes for value in node.values() for link in _links(value)} - seen
    return None


def _links(value: object) -> set[str]:
    return {str(value[0])} if isinstance(value, list) and len(value) == 2 else set()


def _number(graph: Mapping[str, Any], value: object) -> int | None:
    """Return a seed that is written into the node, or into the one it is linked to."""
    for link in _links(value):
        inputs = graph.get(link, {}).get("inputs", {})
        value = next((inputs[name] for name in _VALUE_INPUTS if name in inputs), None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
