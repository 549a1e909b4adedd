"""Pictures of what a dataset holds, for people: categories, judges' numbers by side, agreement of judges."""

import re
from collections import Counter
from pathlib import Path

from ..errors import InputError
from ..files import write_atomically
from .records import PreferencePair

SIDES = ("chosen", "rejected")
_COLOURS = {"chosen": "#2a7f62", "rejected": "#b3452c"}


def plot_dataset(pairs: list[PreferencePair], folder: Path) -> list[Path]:
    """Write PNG files into a folder and return their paths; what there are no numbers for is left out.

    `categories.png`: pairs a category, by review. `scores-<judge>.png`: a histogram of each of its numbers, chosen
    against rejected. `judges.png`: the share of images on which two judges, or a judge and the label, say the same.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plots need matplotlib: pip install matplotlib") from None
    written = [_save(_plot_categories(Figure, pairs), folder / "categories.png")]
    for judge, numbers in sorted(_numbers_of_judges(pairs).items()):
        name = re.sub(r"[^\w.-]+", "-", judge)[:80]
        written.append(_save(_plot_scores(Figure, judge, numbers), folder / f"scores-{name}.png"))
    if verdicts := _verdicts(pairs):
        written.append(_save(_plot_agreement(Figure, verdicts), folder / "judges.png"))
    return written


def _save(figure, path: Path) -> Path:
    with write_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return path


def _plot_categories(figure_class, pairs: list[PreferencePair]):
    counts = {review: Counter() for review in ("accepted", "flipped", "none", "dropped")}  # type: dict[str, Counter]
    for pair in pairs:
        counts[pair.review or "none"].update(pair.categories or ("(none)",))
    names = [name for name, _ in sum(counts.values(), Counter()).most_common()]
    figure = figure_class(figsize=(7, 1.2 + 0.35 * max(len(names), 1)), layout="constrained")
    axes = figure.subplots()
    left = [0] * len(names)
    colours = {"accepted": "#2a7f62", "flipped": "#c9a227", "none": "#8a8f98", "dropped": "#d9dce1"}
    for review, counted in counts.items():
        widths = [counted[name] for name in names]
        if any(widths):
            label = "not reviewed" if review == "none" else review
            axes.barh(names, widths, left=left, color=colours[review], label=label)
            left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("pairs (one with several categories counts in each)")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _numbers_of_judges(pairs: list[PreferencePair]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return judge -> what -> side -> numbers. A score is called judge/side/what (or anything else: then no side)."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for pair in pairs:
        for key, value in pair.scores.items():
            judge, side, what = (*key.split("/", 2), "", "")[:3]
            if what and side in SIDES:
                found.setdefault(judge, {}).setdefault(what, {}).setdefault(side, []).append(value)
            elif not side:
                found.setdefault(judge, {}).setdefault(judge, {}).setdefault("pair", []).append(value)
    return found


def _plot_scores(figure_class, judge: str, numbers: dict[str, dict[str, list[float]]]):
    figure = figure_class(figsize=(7, 0.6 + 2.0 * len(numbers)), layout="constrained")
    for axes, (what, sides) in zip(
        figure.subplots(len(numbers), squeeze=False)[:, 0], sorted(numbers.items()), strict=True
    ):
        values = [value for side in sides.values() for value in side]
        span = (min(values), max(values) if max(values) > min(values) else min(values) + 1)
        for side, given in sides.items():
            axes.hist(given, bins=40, range=span, alpha=0.6, color=_COLOURS.get(side, "#555b66"), label=side)
        axes.set_title(f"{judge}: {what}" if what != judge else judge, fontsize=10)
        axes.set_ylabel("images" if set(sides) <= set(SIDES) else "pairs")
        axes.legend(frameon=False)
    return figure


def _verdicts(pairs: list[PreferencePair]) -> dict[str, dict[tuple[str, str], bool]]:
    """Return judge -> (pair, side) -> unsafe; `label` says rejected is unsafe and chosen is not."""
    found: dict[str, dict[tuple[str, str], bool]] = {}
    for pair in pairs:
        for key, value in pair.scores.items():
            judge, _, side = key.partition("/")
            if side in SIDES:
                found.setdefault(judge, {})[pair.id, side] = value == 1
    if found:
        found["label"] = {(pair.id, side): side == "rejected" for pair in pairs for side in SIDES}
    return found


def _plot_agreement(figure_class, verdicts: dict[str, dict[tuple[str, str], bool]]):
    names = sorted(verdicts, key=lambda name: (name == "label", name))
    shares = [[_agreement(verdicts[a], verdicts[b]) for b in names] for a in names]
    figure = figure_class(figsize=(2.5 + 0.8 * len(names), 2.0 + 0.7 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, line in enumerate(shares):
        for column, share in enumerate(line):
            axes.text(column, row, f"{share:.0%}", ha="center", va="center", color="white" if share < 0.6 else "black")
    figure.colorbar(image, label="share of images with the same verdict")
    return figure


def _agreement(first: dict[tuple[str, str], bool], second: dict[tuple[str, str], bool]) -> float:
    common = first.keys() & second.keys()
    return sum(first[key] == second[key] for key in common) / len(common) if common else float("nan")
