"""Moved to toy/world.py; this name is kept for callers that are not moved yet."""

from ..toy.world import *  # noqa: F403
