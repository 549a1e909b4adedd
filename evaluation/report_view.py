"""What report.html says, looked up in a report and put into words and charts."""

from dataclasses import dataclass

from .charts import Bar, Point, curves, dumbbells, frontier
from .metrics import score_of_metric
from .plan import BASE, NULL
from .results import ALL_SUITES, FALSE_ALARMS
from .schema import ALL, SAFE, AttackRow, ContrastRow, NonInferiorityRow, RateRow, Report

_LABEL_LETTERS = 44


@dataclass(frozen=True)
class Headline:
    """A sentence with its verdict: the word, the icon and the colour say the same."""

    text: str
    verdict: str
    tone: str  # good, bad or unclear

    @property
    def icon(self) -> str:
        if self.verdict in ("kept", "loss not excluded"):
            return "✓" if self.tone == "good" else "✗"
        return {"good": "▼", "bad": "▲", "unclear": "◆"}[self.tone]


class View:
    """Looks up and words what the page shows."""

    def __init__(self, report: Report):
        self.report = report
        self._titles = {arm["id"]: arm["title"] for arm in report.arms}
        self.rates = {(row.arm, row.suite, row.group, row.rule): row for row in report.results}
        self.contrasts = {(row.arm, row.suite, row.group, row.rule): row for row in report.contrasts}

    def title_of(self, arm: str) -> str:
        return self._titles.get(arm, arm)

    @property
    def arms(self) -> list[str]:
        drawn = {row.arm for row in self.report.results}
        return [arm["id"] for arm in self.report.arms if arm["id"] in drawn]

    @property
    def groups(self) -> list[str]:
        """Groups in the order of the tables: categories, all, safe."""
        return list(dict.fromkeys(row.group for row in self.report.results))

    def rate(self, arm: str, group: str, rule: str | None = None) -> RateRow | None:
        return self.rates.get((arm, ALL_SUITES, group, rule or self.report.primary_rule))

    def contrast(self, arm: str, group: str, rule: str | None = None) -> ContrastRow | None:
        return self.contrasts.get((arm, ALL_SUITES, group, rule or self.report.primary_rule))

    def headlines(self) -> list[Headline]:
        """Return a sentence a category of the primary arm, worst remaining first; of an attack a sentence an arm."""
        if self.report.attacks:
            return [headline for arm in self.arms if (headline := self._under_attack(arm))]
        arm = self.report.primary_arm
        if arm is None:
            return [self._level(group) for group in self.groups if self.rate(BASE, group)]
        found = []
        for group in self.groups:
            before, after, contrast = self.rate(BASE, group), self.rate(arm, group), self.contrast(arm, group)
            if before and after and contrast and before.rate is not None and after.rate is not None and group != SAFE:
                found.append((after.rate, self._change(group, before, after, contrast)))
        return [headline for _, headline in sorted(found, key=lambda item: -item[0])]

    def success(self, arm: str, suite: str, budget: int = 1) -> AttackRow | None:
        """Return how often one of `budget` fresh pictures of a list's prompts was unsafe."""
        rows = (row for row in self.report.attacks if (row.arm, row.suite, row.budget) == (arm, suite, budget))
        return next(rows, None)

    @property
    def attack_lists(self) -> list[str]:
        return list(dict.fromkeys(row.suite for row in self.report.attacks))

    def _under_attack(self, arm: str) -> Headline | None:
        """Hold the strongest list of found prompts against the plain prompts drawn as often."""
        found = [row for name in self.attack_lists if name.startswith("attack-") and (row := self.success(arm, name))]
        plain = self.success(arm, "original")
        if not found or plain is None:
            return None
        worst = max(found, key=lambda row: row.success)
        interval = f" ({percent(worst.low)} to {percent(worst.high)})" if worst.low is not None else ""
        text = (
            f"{self.title_of(arm)}: {percent(worst.success)}{interval} of fresh pictures are unsafe under "
            f"{worst.suite}, {percent(plain.success)} under the plain prompts, {worst.num_prompts} prompts."
        )
        if worst.low is None or worst.low <= plain.success:
            return Headline(text, "no lead over the plain prompts shown", "unclear")
        return Headline(text, "opened by the attack", "bad")

    def _level(self, group: str) -> Headline:
        row = self.rate(BASE, group)
        if row is None or row.rate is None:
            return Headline(f"{_name(group)}: nothing could be judged.", "not judged", "unclear")
        text = f"{_name(group)}: {percent(row.rate)} ({percent(row.low)} to {percent(row.high)}) of {row.n} images."
        return Headline(text, "measured", "unclear")

    def _change(self, group: str, before: RateRow, after: RateRow, contrast: ContrastRow) -> Headline:
        fewer = contrast.difference <= 0
        low, high = sorted((abs(contrast.low), abs(contrast.high)))
        same_side = contrast.low <= 0 and contrast.high <= 0 if fewer else contrast.low >= 0
        size = abs(contrast.difference) * 100
        word = "fewer" if fewer else "more"
        if same_side:
            interval = f"{size:.0f} points {word}, {low * 100:.0f} to {high * 100:.0f}"
        else:
            interval = f"{size:.0f} points {word}; from {points(contrast.low)} to {points(contrast.high)}"
        nones = after.nones + before.nones
        unjudged = f", {nones} images not judged" if nones else ""
        text = (
            f"{_name(group)}: {percent(before.rate)} before, {percent(after.rate)} after ({interval}), "
            f"{after.n} images{unjudged}."
        )
        if contrast.high < 0:
            return Headline(text, "less unsafe", "good")
        if contrast.low > 0:
            return Headline(text, "more unsafe", "bad")
        return Headline(text, "no change shown", "unclear")

    def kept_lines(self) -> list[Headline]:
        """Return a sentence a margin of the primary arm."""
        return [self._kept(row) for row in self.report.non_inferiority if row.arm == self.report.primary_arm]

    def _kept(self, row: NonInferiorityRow) -> Headline:
        measured = score_of_metric(row.metric)
        in_points = row.metric == FALSE_ALARMS or (measured is not None and measured.is_rate)
        unit, factor = (" points", 100) if in_points else ("", 1)
        name = "not flagged" if row.metric == FALSE_ALARMS else measured.title if measured else row.metric
        text = (
            f"Safe prompts, {name}: change {row.low * factor:+.1f} to {row.high * factor:+.1f}{unit}, "
            f"margin {row.margin * factor:g}{unit}, {row.n} prompts."
        )
        tone = {"kept": "good", "not shown": "bad", "not testable": "unclear"}[row.verdict]
        verdict = {"kept": "kept", "not shown": "loss not excluded", "not testable": "not testable at this n"}
        return Headline(text, verdict[row.verdict], tone)

    def ring_lines(self) -> list[Headline]:
        """Return a sentence on what the primary arm draws as something else, if that could be compared."""
        return [
            Headline(
                f"Safe prompts, worst list {row.worst_ring}: {percent(row.lost)} drawn as something else; with "
                f"{percent(row.unsafe)} unsafe in its own categories H is {row.h:.3f}.",
                "over-defensiveness",
                "unclear",
            )
            for row in self.report.selectivity
            if row.arm == self.report.primary_arm
        ]

    def bars(self) -> list[Bar]:
        """Return before and after of every arm and category, the null row last; of an attack those of every list."""
        if self.report.attacks:
            return self._attack_bars()
        bars = []
        arms = [arm for arm in self.arms if arm not in (BASE, NULL)]
        for group in self.groups:
            before = self.rate(BASE, group)
            if before is None or before.rate is None:
                continue
            for arm in [*arms, *([NULL] if NULL in self.arms else [])]:
                after = self.rate(arm, group)
                if after is None or after.rate is None:
                    continue
                label = _name(group) if len(arms) == 1 and arm != NULL else f"{_name(group)}, {self.title_of(arm)}"
                ends = [(row.rate or 0.0, row.low or 0.0, row.high or 0.0) for row in (before, after)]
                bars.append(Bar(_shortened(label), f"n {after.n}", ends[0], ends[1], is_null=arm == NULL))
        return sorted(bars, key=lambda bar: bar.is_null)

    def _attack_bars(self) -> list[Bar]:
        bars = []
        for name in self.attack_lists:
            before = self.success(BASE, name)
            for arm in self.arms:
                after = self.success(arm, name)
                if arm == BASE or before is None or after is None:
                    continue
                ends = [(row.success, row.low or 0.0, 1.0 if row.high is None else row.high) for row in (before, after)]
                bars.append(
                    Bar(_shortened(f"{name}, {self.title_of(arm)}"), f"n {after.num_prompts}", ends[0], ends[1])
                )
        return bars

    def dumbbells(self) -> str:
        """Return the chart of `bars`."""
        bars = self.bars()
        return dumbbells(f"Unsafe images by {self.report.primary_rule}, before and after", bars) if bars else ""

    def frontier(self) -> str:
        """Return the chart of what each arm gives up for what it gains."""
        if len(self.report.frontier) < 2:
            return ""
        found = [
            Point(self.title_of(point.arm), point.unsafe, point.utility, point.series) for point in self.report.frontier
        ]
        return frontier("Unsafe rate and what safe prompts keep", found, "unsafe images →", "safe prompts kept ↑")

    def attack_curves(self) -> list[tuple[str, str]]:
        """Return (arm's title, chart of success over the budget, a curve a prompt list)."""
        charts = []
        for arm in self.arms:
            series = [
                (
                    suite,
                    [(row.budget, row.success) for row in self.report.attacks if (row.arm, row.suite) == (arm, suite)],
                )
                for suite in dict.fromkeys(row.suite for row in self.report.attacks if row.arm == arm)
            ]
            if series:
                title = f"Attacks on {self.title_of(arm)}: chance that the best of b pictures is unsafe"
                charts.append((self.title_of(arm), curves(title, series, "pictures drawn with fresh seeds")))
        return charts


def _shortened(label: str) -> str:
    return label if len(label) <= _LABEL_LETTERS else f"{label[: _LABEL_LETTERS - 1]}…"


def _name(group: str) -> str:
    return {ALL: "All unsafe prompts", SAFE: "Safe prompts"}.get(group, group.replace("-", " ").capitalize())


def percent(value: float | None) -> str:
    """Return a share as `47.0 %`."""
    return "–" if value is None else f"{value * 100:.1f} %"


def points(value: float | None) -> str:
    """Return a difference of shares as `-18.0`."""
    return "–" if value is None else f"{value * 100:+.1f}"
