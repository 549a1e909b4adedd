"""The report in a real Chromium: blur, sliders by keyboard, filters, the viewer, and numbers as recomputed."""

import os

import pytest
from rendered_arms import RenderedArms, toy_oracle, toy_plan, toy_suite
from safety_experts.evaluation.audit import write_audit
from safety_experts.evaluation.evaluate import run

sync_api = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run(folder, toy_plan(toy_suite(6)), RenderedArms(), [toy_oracle()], metrics=["toy-adherence"], share=True)
    write_audit(folder, 3)
    return folder


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser, folder):
    page = browser.new_page(reduced_motion="reduce")
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((folder / "report.html").as_uri())
    yield page
    assert not errors
    page.close()


def _filter(locator):
    return locator.evaluate("node => getComputedStyle(node).filter")


def test_pictures_are_blurred_until_asked_for_one_by_one_or_all(page):
    figure = page.locator(".pairs figure.blurred").first
    safe = page.locator(".pairs figure:not(.blurred) img").first
    assert _filter(figure.locator("img").first).startswith("blur") and _filter(safe) == "none"
    figure.locator("button.reveal").focus()
    page.keyboard.press("Enter")
    assert _filter(figure.locator("img").first) == "none"
    assert _filter(page.locator(".grid .blurred img").first).startswith("blur")
    page.locator("#show-all").click()
    assert _filter(page.locator(".grid .blurred img").first) == "none"
    page.reload()
    assert _filter(page.locator(".grid .blurred img").first).startswith("blur")  # it is not remembered


def test_a_slider_moves_with_the_arrow_keys(page):
    slider = page.locator(".pairs input[type=range]").first
    over = page.locator(".pairs img.over").first
    before = over.evaluate("node => getComputedStyle(node).clipPath")
    slider.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "70"
    assert over.evaluate("node => getComputedStyle(node).clipPath") != before


def test_a_filter_leaves_only_its_columns_and_the_viewer_opens_blurred(page):
    cells = page.locator(".grid tbody tr").first.locator("td")
    everything = cells.count()
    page.locator("button.filter", has_text="became safe").click()
    shown = sum(cells.nth(number).is_visible() for number in range(everything))
    assert 0 < shown < everything
    row = page.locator(".grid tbody tr").nth(1)
    row.locator("td:visible button.open").first.click()
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    assert _filter(viewer.locator("img").first).startswith("blur")
    assert "toy-oracle/violence" in viewer.inner_text()
    viewer.locator("input[type=range]").press("ArrowLeft")
    page.keyboard.press("Escape")
    assert not viewer.is_visible()


def test_the_audit_is_answered_by_two_keys(browser, folder):
    page = browser.new_page()
    page.goto((folder / "audit.html").as_uri())
    assert _filter(page.locator("#holder img")).startswith("blur")
    page.locator("#holder").press("Enter")
    assert _filter(page.locator("#holder img")) == "none"
    for key in "us":
        page.keyboard.press(key)
    assert page.locator("#state").inner_text().startswith("3 of ")
    with page.expect_download() as download:
        page.locator("#save").click()
    lines = download.value.path().read_text().splitlines()
    assert lines[0] == "image,answer" and [line.split(",")[1] for line in lines[1:]] == ["unsafe", "safe"]
    page.close()
