"""Pictures inside a report: thumbnails as text, blurred or averaged away, and which pairs are worth looking at."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import InputError
from .plan import BASE
from .results import Evaluation
from .samples import Sample, read_picture

THUMBNAIL_PX, HIDDEN_PX = 320, 12
_PAIRS_OF_A_KIND = 2
RANKING = (
    "Two that are still unsafe (the detectors' strongest scores first), two that became safe, two safe prompts, and "
    "the two safe prompts whose picture changed most, pixel by pixel."
)


@dataclass(frozen=True)
class Picture:
    """One image of a report.

    Args:
        data: a data URL, WebP; with `is_hidden` only averages of the picture.
        link: path of the whole file, relative to the report; None in a shared report.
        flagged_by: names of the rules that call it unsafe.
    """

    arm: str
    data: str
    alt: str
    link: str | None
    is_blurred: bool
    is_hidden: bool
    flagged_by: tuple[str, ...]
    is_judged: bool
    scores: tuple[tuple[str, float], ...]
    width: int
    height: int


@dataclass(frozen=True)
class Pair:
    """Before and after of one prompt and seed."""

    why: str
    caption: str
    is_unsafe: bool
    before: Picture
    after: Picture


@dataclass(frozen=True)
class Column:
    """One prompt and seed in the grid: how its verdict changed, and a picture an arm (None: not drawn)."""

    caption: str
    change: str
    is_unsafe: bool
    group: str
    pictures: tuple[Picture | None, ...]


class Album:
    """Makes the pictures of one report.

    Args:
        folder: of the evaluation.
        prompts: (suite, prompt id) -> its line of prompts.jsonl.
        share: leave out every pixel that a rule flags or that nobody could judge, and the unsafe prompts' texts.
    """

    def __init__(self, folder: Path, evaluation: Evaluation, prompts: Mapping, *, share: bool):
        self.folder, self.evaluation, self.prompts, self.share = folder, evaluation, prompts, share
        self._by_key = {sample.key: sample for sample in evaluation.samples}
        self._pictures: dict[tuple, Picture] = {}

    def image(self, sample: Sample) -> Image.Image:
        """Return a sample's whole picture.

        Raises:
            InputError: its file is missing or broken.
        """
        return read_picture(self.folder, sample)

    def is_hidden(self, sample: Sample) -> bool:
        """Say whether a picture that is shown to anybody must not be seen: flagged by a rule, or not judged."""
        return bool(self.flagged_by(sample)) or not self._is_judged(sample)

    def _is_judged(self, sample: Sample) -> bool:
        return self.evaluation.verdicts[self.evaluation.primary_rule][sample.key] is not None

    def flagged_by(self, sample: Sample) -> tuple[str, ...]:
        return tuple(name for name, verdicts in self.evaluation.verdicts.items() if verdicts[sample.key])

    def picture(self, sample: Sample) -> Picture:
        """Return a sample's picture.

        Raises:
            InputError: its file is missing or broken.
        """
        if sample.key not in self._pictures:
            self._pictures[sample.key] = self._make(sample)
        return self._pictures[sample.key]

    def _make(self, sample: Sample) -> Picture:
        image = self.image(sample)
        flagged = self.flagged_by(sample)
        is_judged = self._is_judged(sample)
        is_hidden = self.share and self.is_hidden(sample)
        width, height = image.size
        if is_hidden:
            image = image.resize((HIDDEN_PX, HIDDEN_PX), Image.Resampling.BOX)
        else:
            image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        verdict = "unsafe" if flagged else "not flagged" if is_judged else "not judged"
        return Picture(
            arm=sample.arm,
            data=data_url(image),
            alt=f"prompt {sample.prompt_id}, {sample.arm}, seed {sample.seed}: {verdict}",
            link=None if self.share else sample.image,
            is_blurred=bool(flagged) or sample.kind == "unsafe" or not is_judged,
            is_hidden=is_hidden,
            flagged_by=flagged,
            is_judged=is_judged,
            scores=tuple(sorted((sample.scores | sample.metrics).items())),
            width=width,
            height=height,
        )

    def caption(self, sample: Sample) -> str:
        """Return prompt and seed; a hash stands for what an attack found, and in a shared report for unsafe prompts."""
        line = self.prompts.get((sample.suite, sample.prompt_id))
        is_found = sample.suite in self.evaluation.plan["notes"].get("attack_suites", [])
        if line is None or is_found or (self.share and sample.kind == "unsafe"):
            return f"prompt {sample.prompt_sha[:12]}, seed {sample.seed}"
        return f"{line['text']} · seed {sample.seed}"

    def pairs(self, arm: str) -> list[Pair]:
        """Return the pairs to look at first, worst remaining first (see RANKING)."""
        found: list[Pair] = []
        shown: set[tuple] = set()
        for why, ranked in self._ranked(arm):
            fresh = [pair for pair in ranked if pair[1].pair_key not in shown][:_PAIRS_OF_A_KIND]
            for before, after in fresh:
                shown.add(after.pair_key)
                is_unsafe = after.kind == "unsafe"
                pictures = self.picture(before), self.picture(after)
                found.append(Pair(why, self.caption(after), is_unsafe, *pictures))
        return found

    def sample_pairs(self, arm: str, most: int) -> list[tuple[Sample, Sample]]:
        """Return at most so many (before, after), worst remaining first, some of every kind."""
        found: dict[tuple, tuple[Sample, Sample]] = {}
        for share in (max(1, most // 4), most):
            for _, ranked in self._ranked(arm):
                for pair in ranked[:share]:
                    if len(found) < most:
                        found.setdefault(pair[1].pair_key, pair)
        return list(found.values())

    def _ranked(self, arm: str) -> list[tuple[str, list[tuple[Sample, Sample]]]]:
        both = self._both(arm)
        unsafe = [pair for pair in both if pair[1].kind == "unsafe"]
        safe = [pair for pair in both if pair[1].kind == "safe"]
        verdicts = self.evaluation.verdicts[self.evaluation.primary_rule]
        remaining = [pair for pair in unsafe if verdicts[pair[1].key]]
        became_safe = [pair for pair in unsafe if verdicts[pair[0].key] and verdicts[pair[1].key] is False]
        return [
            ("still unsafe", sorted(remaining, key=lambda pair: -_strength(pair[1]))),
            ("became safe", sorted(became_safe, key=lambda pair: -_strength(pair[0]))),
            ("safe prompt", safe),
            ("safe prompt, changed most", sorted(safe, key=lambda pair: -self._change(*pair))),
        ]

    def _both(self, arm: str) -> list[tuple[Sample, Sample]]:
        after = [sample for sample in self.evaluation.samples if sample.arm == arm]
        pairs = [(self._by_key.get((BASE, *sample.pair_key)), sample) for sample in after]
        return [(before, sample) for before, sample in pairs if before is not None]

    def _change(self, before: Sample, after: Sample) -> float:
        pixels = [_small(self.folder, sample) for sample in (before, after)]
        return float(np.abs(pixels[0] - pixels[1]).mean())

    def columns(self, arms: Sequence[str], arm: str, most: int) -> list[Column]:
        """Return the grid's columns, of `arm` those that are or became unsafe first.

        Args:
            most: how many to show at most.
        """
        verdicts = self.evaluation.verdicts[self.evaluation.primary_rule]
        ranks = ("became unsafe", "stayed unsafe", "became safe", "not judged", "unchanged")
        changes = []
        for before, after in self._both(arm):
            was, now = verdicts[before.key], verdicts[after.key]
            if was is None or now is None:
                change = "not judged"
            elif now:
                change = "stayed unsafe" if was else "became unsafe"
            else:
                change = "became safe" if was else "unchanged"
            changes.append((change, after))
        # Some of each change, so that a filter never shows an empty grid while there is something.
        order: list[tuple[str, Sample]] = []
        groups = {rank: [item for item in changes if item[0] == rank] for rank in ranks}
        share = max(1, most // max(1, sum(bool(group) for group in groups.values())))
        for rank in ranks:
            order += groups[rank][:share]
        rest = [item for rank in ranks for item in groups[rank][share:]]
        order = sorted((order + rest)[:most], key=lambda item: ranks.index(item[0]))
        columns = []
        for change, sample in order:
            row = [self._by_key.get((name, *sample.pair_key)) for name in arms]
            columns.append(
                Column(
                    self.caption(sample),
                    change,
                    sample.kind == "unsafe",
                    ", ".join(sample.categories) or sample.kind,
                    tuple(self.picture(found) if found else None for found in row),
                )
            )
        return columns


def _small(folder: Path, sample: Sample) -> np.ndarray:
    try:
        image = read_picture(folder, sample)
    except InputError:
        return np.zeros((32, 32, 3), dtype=np.float32)
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float32)


def _strength(sample: Sample) -> float:
    return max(sample.scores.values(), default=0.0)


def data_url(image: Image.Image) -> str:
    """Return an image as a WebP data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80, method=4, lossless=max(image.size) <= 64)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
