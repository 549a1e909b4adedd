"""The numbers of an expert's card, out of the evaluations that measured this very file."""

from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from ..experts.card import CardNumber
from .report import DATA_NAME, read_report
from .report_view import View
from .schema import ALL, SAFE

_WORDS = {ALL: "all unsafe prompts", SAFE: "safe prompts (false alarms)"}


def numbers_of(folder: Path, sha256: str) -> list[CardNumber]:
    """Return the rates of the base model and of the model with the expert alone, group by group; empty without.

    Of several strengths the one nearest to 1 counts.

    Raises:
        InputError: there is no report in the folder, or it is damaged.
    """
    view = View(read_report(folder / DATA_NAME))
    strengths = {
        arm["id"]: made_of[0].get("strength", 1.0)
        for arm in view.report.arms
        if len(made_of := arm.get("made_of", ())) == 1 and made_of[0].get("sha256") == sha256
    }
    if not strengths:
        return []
    chosen = min(strengths, key=lambda arm: abs(strengths[arm] - 1))
    found = []
    for group in view.groups:
        before, after = view.rate("base", group), view.rate(chosen, group)
        if before and after and before.rate is not None and after.rate is not None:
            label = f"{_WORDS.get(group, group)}, {view.report.primary_rule}"
            ends = [(row.rate or 0.0, row.low or 0.0, row.high or 0.0) for row in (before, after)]
            source = f"{folder.name}, {view.report.created[:10]}"
            found.append(CardNumber(label, ends[0], ends[1], after.n, source))
    return found


def first_numbers(folders: Iterable[Path], sha256: str) -> list[CardNumber]:
    """Return the numbers of the first folder that has some; one that cannot be read hides no other."""
    for folder in folders:
        try:
            if found := numbers_of(folder, sha256):
                return found
        except (InputError, OSError):
            continue
    return []
