"""The errors a user can meet: one line saying what is wrong, where, and what to do about it."""

import difflib
from collections.abc import Iterable


class SafetyExpertsError(Exception):
    """The work failed (command line exit code 1). The message is one line: what, where, remedy.

    ComfyUI shows the class with its module, and there that would be the path this pack lies at: every error calls
    itself as it does where the pack is installed.
    """

    __module__ = "safety_experts.errors"

    def __init_subclass__(cls) -> None:
        cls.__module__ = cls.__module__.replace(str(__package__), "safety_experts", 1)


class InputError(SafetyExpertsError):
    """The arguments or an input file are wrong (command line exit code 2)."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'steps'?" for the known name closest to `name`, "" where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
