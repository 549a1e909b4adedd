"""What `validate_inputs` may find wrong before anything runs, so that the node is red at once and says why.

ComfyUI calls it without the values of links, so every check leaves out what is None. An input that is named there is no
longer checked by ComfyUI itself, and an error is reported once for each: name only what is checked.
"""

from collections.abc import Callable
from typing import Any

from ..errors import SafetyExpertsError


def first_problem(*checks: tuple[Callable[[Any], object], Any]) -> bool | str:
    """Return True, or what the first failing check says; a check is (function, value) and is left out for None."""
    for check, value in checks:
        if value is None:
            continue
        try:
            check(value)
        except SafetyExpertsError as error:
            return str(error)
    return True
