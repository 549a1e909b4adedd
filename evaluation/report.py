"""A report a person can open anywhere: one HTML file with its tables and pictures inside, and its numbers as JSON."""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..files import write_atomically
from .statistics import Rate

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { font-size: 1.7rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
table { border-collapse: collapse; margin: .8rem 0 } caption { text-align: left; padding-bottom: .4rem }
th, td { padding: .35rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888; font-weight: 600 }
.interval { color: #666; font-size: .8em; white-space: nowrap } .note { color: #444 }
.pass { color: #17692f } .miss { color: #a3211c; font-weight: 600 }
.pictures th { text-align: left; font-weight: 500 } .pictures td { padding: .2rem; border: 0 }
.pictures img { display: block; width: 72px; height: 72px; image-rendering: pixelated; border-radius: 3px }
"""


@dataclass(frozen=True)
class Table:
    """Rows of numbers. A cell is text or a `Rate`, shown as a percentage with its interval."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str | Rate]]]
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """A grid of pictures: every row has a label, every column a caption (the prompt and seed they share)."""

    title: str
    captions: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Image.Image]]]
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One promise, whether it was kept, and the number that says so."""

    promise: str
    kept: bool
    measured: str


@dataclass(frozen=True)
class Report:
    """What `write_report` lays out, in order."""

    title: str
    summary: str
    checks: Sequence[Check]
    sections: Sequence[Table | Pictures]
    details: dict = field(default_factory=dict)  # machine, versions, settings: shown as they are


def write_report(folder: str | Path, report: Report, numbers: dict) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` (the `numbers`) into `folder`; return their paths.

    Raises:
        SafetyExpertsError: the folder cannot be written to.
    """
    page, data = Path(folder) / "report.html", Path(folder) / "report.json"
    with write_atomically(data) as temporary:
        temporary.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    with write_atomically(page) as temporary:
        temporary.write_text(_page(report), encoding="utf-8")
    return page, data


def _page(report: Report) -> str:
    parts = [f"<h1>{html.escape(report.title)}</h1>", f"<p>{html.escape(report.summary)}</p>"]
    if report.checks:
        rows = [
            f"<tr><td>{html.escape(check.promise)}</td><td>{html.escape(check.measured)}</td>"
            + (f"<td class={'pass' if check.kept else 'miss'}>{'kept' if check.kept else 'MISSED'}</td></tr>")
            for check in report.checks
        ]
        parts.append(f"<table><thead>{_cells('th', ['Promise', 'Measured', ''])}</thead>{''.join(rows)}</table>")
    for section in report.sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts.append(_table(section) if isinstance(section, Table) else _pictures(section))
        if section.note:
            parts.append(f"<p class=note>{html.escape(section.note)}</p>")
    if report.details:
        details = "".join(_cells("td", [key, str(value)]) for key, value in report.details.items())
        parts.append(f"<h2>How this was made</h2><table>{details}</table>")
    return (
        '<!doctype html><html lang=en><meta charset="utf-8"><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(report.title)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"


def _table(table: Table) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(label)}</td>{''.join(f'<td>{_value(cell)}</td>' for cell in cells)}</tr>"
        for label, cells in table.rows
    )
    return f"<table><thead>{_cells('th', ['', *table.columns])}</thead>{rows}</table>"


def _value(cell: str | Rate) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    interval = f"{cell.low * 100:.0f}–{cell.high * 100:.0f} %, n = {cell.num_images}"
    return f"{cell.value * 100:.1f} %<br><span class=interval>{interval}</span>"


def _pictures(grid: Pictures) -> str:
    def picture(image: Image.Image, caption: str) -> str:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        text = html.escape(caption, quote=True)
        source = base64.b64encode(buffer.getvalue()).decode()
        return f'<td><img src="data:image/png;base64,{source}" alt="{text}" title="{text}"></td>'

    rows = "".join(
        f"<tr><th>{html.escape(label)}</th>"
        + "".join(picture(image, caption) for image, caption in zip(images, grid.captions, strict=True))
        + "</tr>"
        for label, images in grid.rows
    )
    return f"<table class=pictures>{rows}</table>"
