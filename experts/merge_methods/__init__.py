"""The merge methods by name, each beside its function; nodes, command line and docs are made from this table.

A new method is a function and an entry in its module's METHODS; a new module is named here.
"""

from . import concatenation, selection, singular, sparsification, sphere
from .method import Contribution, LayerTask, MergedLayer, MergeMethod, Parameter

METHODS: dict[str, MergeMethod] = {
    method.name: method
    for module in (concatenation, selection, sparsification, singular, sphere)
    for method in module.METHODS
}

__all__ = ["METHODS", "LayerTask", "MergeMethod", "MergedLayer", "Parameter", "Contribution"]
