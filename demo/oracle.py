"""Moved to toy/oracle.py; this name is kept for callers that are not moved yet."""

from ..toy.oracle import *  # noqa: F403
