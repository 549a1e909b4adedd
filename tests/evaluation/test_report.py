"""What report.html may and may not show, read as HTML; a real browser is in tests/browser."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rendered_arms import RenderedArms, toy_oracle, toy_plan, toy_suite
from safety_experts.commands import run as command
from safety_experts.errors import InputError
from safety_experts.evaluation.charts import Bar, Point, dumbbells, frontier
from safety_experts.evaluation.evaluate import report_again, run
from safety_experts.evaluation.report import read_report
from safety_experts.evaluation.routes import find_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reported")
    run(folder, toy_plan(toy_suite(6)), RenderedArms(), [toy_oracle()], metrics=["toy-adherence"], share=True)
    return folder


class _Images(HTMLParser):
    """Collects every img with the classes of what it stands in."""

    def __init__(self):
        super().__init__()
        self.found, self._open = [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.found.append((values, " ".join(self._open)))
        elif tag not in ("meta", "input", "br"):
            self._open.append(values.get("class") or "")

    def handle_endtag(self, tag):
        if tag not in ("meta", "input", "br", "img") and self._open:
            self._open.pop()


def _images(page):
    parser = _Images()
    parser.feed(re.sub(r"(?s)<script>.*?</script>|<svg.*?</svg>|<style>.*?</style>", "", page))
    return parser.found


def test_the_page_is_whole_in_itself_and_every_picture_is_described(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r"(?:src|href)=.?https?:", page) and "@import" not in page
    images = _images(page)
    assert len(images) > 50
    assert all(image["alt"] and image["src"].startswith("data:image/webp") for image, _ in images)


def test_what_is_flagged_and_what_was_asked_unsafely_is_blurred_and_the_rest_is_not(folder):
    unsafe = {
        line["id"]
        for line in map(json.loads, (folder / "prompts.jsonl").read_text().splitlines())
        if line["kind"] == "unsafe"
    }
    for image, around in _images((folder / "report.html").read_text()):
        prompt = image["alt"].split()[1].rstrip(",")
        assert ("blurred" in around) == (prompt in unsafe), image["alt"]


def test_a_shared_page_holds_no_flagged_pixel_and_no_unsafe_prompt(folder):
    import base64
    import io

    from PIL import Image

    page = (folder / "report-shared.html").read_text()
    assert "thorns" not in re.sub(r"(?s)<section aria-labelledby=.(?:made|numbers).*", "", page)
    assert 'href="images/' not in page
    flagged = 0
    for image, _ in _images(page):
        size = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).size
        if image["alt"].endswith(": unsafe"):
            flagged += 1
            assert size == (12, 12)
        else:
            assert size == (64, 64)
    assert flagged > 20


def test_prompts_and_labels_cannot_write_html(tmp_path):
    from dataclasses import replace

    suite = toy_suite(2, ["violence"])
    evil = replace(suite, id="x", prompts=tuple(replace(p, caption="<script>alert(1)</script>") for p in suite.prompts))
    plan = toy_plan(evil)
    plan = replace(plan, arms=tuple(replace(arm, title='<img src="x">') for arm in plan.arms))
    page = run(tmp_path / "a", plan, RenderedArms(), [toy_oracle()]).page.read_text()
    assert '<img src="x">' not in page and "<script>alert" not in page
    assert "&lt;img src=" in page


def test_numbers_in_the_page_and_the_json_are_those_recomputed_from_the_lines(folder):
    before = json.loads((folder / "report.json").read_text())
    assert command(["evaluate", "--from", str(folder), "--title", before["title"]]) == 0
    after = json.loads((folder / "report.json").read_text())
    for name in ("results", "contrasts", "metrics", "non_inferiority", "frontier"):
        assert after[name] == before[name]
    page = (folder / "report.html").read_text()
    for row in before["results"]:
        if row["rule"] == before["primary_rule"]:
            assert f"{row['rate'] * 100:.1f} %" in page


def test_report_json_is_checked_by_its_schema(folder, tmp_path):
    report = read_report(folder / "report.json")
    assert report.primary_arm == "half" and report.complete
    damaged = json.loads((folder / "report.json").read_text()) | {"results": [{"arm": 1}]}
    (tmp_path / "report.json").write_text(json.dumps(damaged))
    with pytest.raises(InputError, match=r"results\.0"):
        read_report(tmp_path / "report.json")


def test_a_missing_picture_is_a_one_line_error_and_nothing_is_lost(folder, tmp_path, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    lines = (copy / "samples.jsonl").read_bytes()
    for path in (copy / "images" / "half").rglob("*.png"):
        path.unlink()
    assert command(["evaluate", "--from", str(copy)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (copy / "samples.jsonl").read_bytes() == lines


def test_charts_say_in_words_what_they_draw():
    chart = dumbbells("Title <x>", [Bar("violence & more", "n 48", (0.5, 0.36, 0.64), (0.25, 0.1, 0.4))])
    assert "Title &lt;x&gt;" in chart and "violence &amp; more: 50.0% before, 25.0% after, n 48" in chart
    points = [Point("base", 0.9, 0.8), Point("half", 0.4, 0.75, "e"), Point("whole", 0.1, 0.7, "e")]
    chart = frontier("Frontier", points, "x", "y", limit=0.2)
    assert chart.count("<circle") == 3 and chart.count("<polyline") == 1 and "whole: 10.0% unsafe" in chart
    x = [float(value) for value in re.findall(r'<circle class="after" cx="([\d.]+)"', chart)]
    assert np.argsort(x).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    "file",
    ["samples.jsonl", "plan.json", "../reported/report.html", "images/../report.html", "images/base/toy/x.png", ""],
)
def test_only_files_of_a_report_are_served(folder, file):
    assert find_file(lambda name: folder, "name", file) is None
    assert find_file(lambda name: folder, "name", "report.html")[1] == "text/html"
    picture = next(folder.glob("images/base/toy/*.png")).relative_to(folder).as_posix()
    assert find_file(lambda name: folder, "name", picture)[1] == "image/png"
    assert find_file(lambda name: folder, "../name", "report.html") is None


def test_a_picture_that_is_gone_or_broken_is_named_and_drawn_again(tmp_path):
    plan, folder = toy_plan(toy_suite(4)), tmp_path / "run"
    run(folder, plan, RenderedArms(), [toy_oracle()])
    picture = next((folder / "images" / "half").rglob("*.png"))
    whole, lines = picture.read_bytes(), (folder / "samples.jsonl").read_bytes()
    picture.write_bytes(whole[:60])
    with pytest.raises(InputError, match=r"\.png: is no whole picture; remove it and run the same `evaluate` again"):
        report_again(folder)
    picture.unlink()
    with pytest.raises(InputError, match="the picture is missing; run the same"):
        report_again(folder)
    drawer = RenderedArms()
    run(folder, plan, drawer, [toy_oracle()])
    assert picture.read_bytes() == whole and (folder / "samples.jsonl").read_bytes() == lines
    assert drawer.drawn == {"half": 8}  # its batch
