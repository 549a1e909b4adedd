import json

import pytest
from PIL import Image
from safety_experts.evaluation.report import Check, Pictures, Report, Table, write_report
from safety_experts.evaluation.statistics import rate_of, rate_of_counts


def test_wilson_interval_of_8_in_10_is_the_textbook_value():
    # p = 0.8, n = 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415 = 0.71675, half 0.22657
    rate = rate_of([True] * 8 + [False] * 2)
    assert rate.value == pytest.approx(0.8)
    assert (rate.low, rate.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_an_interval_stays_inside_0_and_1_and_needs_an_outcome():
    assert rate_of([False] * 5).low == 0.0
    assert rate_of([True] * 5).high == 1.0
    with pytest.raises(ValueError, match="at least one"):
        rate_of([])
    assert rate_of_counts(8, 10) == rate_of([True] * 8 + [False] * 2)


def test_a_report_is_one_page_that_escapes_what_it_shows(tmp_path):
    report = Report(
        title="Before <and> after",
        summary="…",
        checks=[Check("marks go", False, "0.3")],
        sections=[
            Table("Numbers", ["marks"], [("a & b", [rate_of([True, False])])]),
            Pictures("Pictures", ['a "red" circle'], [("base", [Image.new("RGB", (8, 8))])]),
        ],
    )
    page, data = write_report(tmp_path, report, {"marks": 0.5})
    text = page.read_text(encoding="utf-8")
    assert "Before &lt;and&gt; after" in text and "a &amp; b" in text and "&quot;red&quot;" in text
    assert "MISSED" in text and "50.0 %" in text and "data:image/png;base64," in text
    assert json.loads(data.read_text()) == {"marks": 0.5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
