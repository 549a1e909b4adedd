"""Charts as SVG text: drawn by the page's own colours, readable by a screen reader, a few kilobytes each."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _LABEL, _RIGHT, _ROW = 820, 300, 70, 30


@dataclass(frozen=True)
class Bar:
    """One row of a dumbbell chart: rates in 0..1 with interval ends, before and after."""

    label: str
    note: str
    before: tuple[float, float, float]  # value, low, high
    after: tuple[float, float, float]
    is_null: bool = False


@dataclass(frozen=True)
class Point:
    """One arm of a frontier: x and y in 0..1."""

    label: str
    x: float
    y: float
    series: str | None = None


def dumbbells(title: str, bars: Sequence[Bar]) -> str:
    """Return a row a bar: a ring before, a disc after, whiskers for the 95 % intervals, percent along the bottom."""
    height = _ROW * len(bars) + 34
    left, right = _LABEL, _WIDTH - _RIGHT

    def x(value: float) -> float:
        return round(left + (right - left) * value, 1)

    parts = [_axis(x(tick), 6, height - 26, f"{tick:.0%}".replace("%", " %")) for tick in (0, 0.25, 0.5, 0.75, 1)]
    for row, bar in enumerate(bars):
        y = _ROW * row + 20
        kind = " null" if bar.is_null else ""
        (was, was_low, was_high), (now, now_low, now_high) = bar.before, bar.after
        parts += [
            f'<text class="label" x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(bar.label)}</text>',
            f'<text class="small" x="{right + 10}" y="{y + 4}">{escape(bar.note)}</text>',
            f'<line class="whisker before" x1="{x(was_low)}" x2="{x(was_high)}" y1="{y - 5}" y2="{y - 5}"/>',
            f'<line class="whisker after{kind}" x1="{x(now_low)}" x2="{x(now_high)}" y1="{y + 5}" y2="{y + 5}"/>',
            f'<line class="bar{kind}" x1="{x(was)}" x2="{x(now)}" y1="{y}" y2="{y}"/>',
            f'<circle class="before" cx="{x(was)}" cy="{y}" r="6"/>',
            f'<circle class="after{kind}" cx="{x(now)}" cy="{y}" r="6"/>',
        ]
    described = "; ".join(
        f"{bar.label}: {bar.before[0]:.1%} before, {bar.after[0]:.1%} after, {bar.note}" for bar in bars
    )
    return _svg(title, described, _WIDTH, height, parts)


def frontier(title: str, points: Sequence[Point], x_title: str, y_title: str, limit: float | None = None) -> str:
    """Return unsafe rate (x) against utility (y), a point an arm; points of one series are joined.

    Args:
        limit: x up to which a gate holds, shaded.
    """
    width, height, left, bottom, top = 720, 360, 60, 44, 16
    low = min([point.y for point in points], default=0.0)
    floor = max(0.0, min(0.9, (low * 10 // 1) / 10))
    right_end = min(1.0, max([point.x for point in points], default=1.0) * 1.15 + 0.05)

    def x(value: float) -> float:
        return round(left + (width - left - 150) * value / right_end, 1)

    def y(value: float) -> float:
        return round(height - bottom - (height - bottom - top) * (value - floor) / (1 - floor), 1)

    parts = []
    if limit is not None:
        edge = x(min(limit, right_end))
        parts.append(f'<rect class="gate" x="{left}" y="{top}" width="{edge - left}" height="{y(floor) - top}"/>')
    for step in range(5):
        across, up = right_end * step / 4, floor + (1 - floor) * step / 4
        parts.append(_axis(x(across), top, height - bottom, f"{across:.0%}"))
        parts.append(f'<text class="small" x="{left - 8}" y="{y(up) + 4}" text-anchor="end">{up:.0%}</text>')
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 150}" y1="{y(up)}" y2="{y(up)}"/>')
    for name in dict.fromkeys(point.series for point in points if point.series):
        joined = " ".join(f"{x(point.x)},{y(point.y)}" for point in points if point.series == name)
        parts.append(f'<polyline class="curve" points="{joined}"/>')
    # Labels that would touch are moved apart.
    taken: list[float] = []
    for point in sorted(points, key=lambda point: -point.y):
        at = y(point.y) + 4
        while any(abs(at - other) < 14 for other in taken):
            at += 14
        taken.append(at)
        parts.append(f'<circle class="after" cx="{x(point.x)}" cy="{y(point.y)}" r="5"/>')
        parts.append(f'<line class="leader" x1="{x(point.x) + 6}" y1="{y(point.y)}" x2="{width - 142}" y2="{at - 4}"/>')
        parts.append(f'<text class="small" x="{width - 138}" y="{at}">{escape(point.label[:24])}</text>')
    parts.append(f'<text class="small" x="{left}" y="{height - 6}">{escape(x_title)}</text>')
    parts.append(f'<text class="small" x="{left + 6}" y="{top - 4}">{escape(y_title)}</text>')
    described = "; ".join(f"{point.label}: {point.x:.1%} unsafe, {point.y:.1%} kept" for point in points)
    return _svg(title, described, width, height, parts)


def curves(title: str, series: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_title: str) -> str:
    """Return lines of (x, y in 0..1), x on its own scale; each ends in its label."""
    width, height, left, bottom = 720, 300, 60, 40
    most = max([x for _, points in series for x, _ in points], default=1) or 1

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = point
        return round(left + (width - left - 170) * x / most, 1), round((height - bottom) * (1 - y) + 10 * y, 1)

    parts = []
    for step in range(5):
        _, y = place((0, step / 4))
        parts.append(f'<line class="grid" x1="{left}" x2="{width - 170}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="small" x="{left - 8}" y="{y + 4}" text-anchor="end">{step / 4:.0%}</text>')
        x, _ = place((most * step / 4, 0))
        parts.append(f'<text class="small" x="{x}" y="{height - 22}" text-anchor="middle">{most * step / 4:g}</text>')
    taken: list[float] = []
    for number, (name, points) in enumerate(series):
        if not points:
            continue
        placed = [place(point) for point in points]
        joined = " ".join(f"{x},{y}" for x, y in placed)
        at = placed[-1][1] + 4
        while any(abs(at - other) < 14 for other in taken):
            at += 14
        taken.append(at)
        parts.append(f'<polyline class="curve curve{number % 4}" points="{joined}"/>')
        parts.append(f'<text class="small" x="{placed[-1][0] + 8}" y="{at}">{escape(name[:26])}</text>')
    parts.append(f'<text class="small" x="{left}" y="{height - 4}">{escape(x_title)}</text>')
    described = "; ".join(f"{name}: {points[-1][1]:.1%} at the end" for name, points in series if points)
    return _svg(title, described, width, height, parts)


def _axis(x: float, top: float, bottom: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
        f'<text class="small" x="{x}" y="{bottom + 16}" text-anchor="middle">{label}</text>'
    )


def _svg(title: str, described: str, width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title><desc>{escape(described)}</desc>{''.join(parts)}</svg>"
    )
