"""The review page as a reviewer uses it, in a real Chromium, without ComfyUI.

make test-browser ARGS="-k review"
"""

import json
from pathlib import Path

import pytest
from review_browser import ReviewPage, open_chromium
from review_datasets import ReviewCommand, make_review_dataset, reviews_on_disk


@pytest.fixture(scope="module")
def chromium():
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def folder(tmp_path):
    """60 pairs, some of them with exchanged sides that the judge has found."""
    return make_review_dataset(tmp_path / "toy", 60, spoiled=0.3)


@pytest.fixture
def server(folder):
    with ReviewCommand(folder) as server:
        yield server


@pytest.fixture
def review(chromium, server):
    page = chromium.new_page(viewport={"width": 1366, "height": 768})
    opened = ReviewPage(page, server.url)
    opened.wait_for_first_picture()
    yield opened
    assert opened.errors == []
    page.close()


def spoiled_ids(folder) -> list[str]:
    lines = map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    return [line["id"] for line in lines if line["chosen_unsafe"]]


def test_decisions_by_keyboard_are_on_disk_and_can_be_undone(review, folder):
    ids = list(reviews_on_disk(folder))
    for key in "afd":
        review.press(key)
    assert [reviews_on_disk(folder)[pair_id] for pair_id in ids[:4]] == ["accepted", "flipped", "dropped", None]
    assert review.pair_id() == ids[3] and review.reviewed() == 3
    review.press("u")
    review.press("Control+z")
    assert [reviews_on_disk(folder)[pair_id] for pair_id in ids[:3]] == ["accepted", None, None]
    assert review.pair_id() == ids[1] and review.reviewed() == 1
    review.press("End")
    review.press("n")
    assert review.pair_id() == ids[1]


def test_keys_pressed_faster_than_the_disk_are_all_done_in_order(review, folder):
    for key in "afdafdafda":
        review.page.keyboard.press(key)
    review.press("Shift")
    expected = ["accepted", "flipped", "dropped"] * 3 + ["accepted", None]
    assert list(reviews_on_disk(folder).values())[:11] == expected


def test_what_is_unsafe_is_covered_until_asked_for(review, folder):
    spoiled = spoiled_ids(folder)
    while review.pair_id() in spoiled:
        review.press("ArrowRight")
    assert not review.is_veiled("chosen") and review.is_veiled("rejected")

    review.page.keyboard.down(" ")
    assert not review.is_veiled("rejected")
    review.page.keyboard.up(" ")
    assert review.is_veiled("rejected")

    box = review.page.locator("figure[data-side=rejected] .frame").bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    review.page.mouse.move(*middle)
    review.page.mouse.move(middle[0] + 5, middle[1])
    assert not review.is_veiled("rejected")
    review.press("ArrowRight")  # the mouse rests where the next unsafe picture comes
    assert review.is_veiled("rejected")

    review.press("b")
    assert not review.is_veiled("rejected")
    review.page.reload()
    review.wait_for_first_picture()
    assert review.is_veiled("rejected")  # an open eye is not remembered

    while review.pair_id() not in spoiled:
        review.press("ArrowRight")
    assert review.is_veiled("chosen") and review.is_veiled("rejected")
    review.press("f")
    review.press("ArrowLeft")
    assert not review.is_veiled("chosen") and review.is_veiled("rejected")


def test_in_the_grid_unsafe_pictures_are_not_even_loaded_until_asked_for(review):
    asked = []
    review.page.wait_for_load_state("networkidle")  # the single view has loaded the pairs that come next
    review.page.on("request", lambda request: asked.append(request.url))
    review.press("g")
    review.page.wait_for_function("() => document.querySelectorAll('.cell img.veiled').length > 10")
    review.page.wait_for_load_state("networkidle")
    assert asked and not [url for url in asked if "side=rejected" in url and "size=veil" not in url]
    review.page.keyboard.down(" ")
    review.page.wait_for_function(
        "() => document.querySelector('.cell[aria-selected=true] [data-side=rejected]').src.includes('thumbnail')"
    )
    review.page.keyboard.up(" ")
    review.page.wait_for_function(
        "() => document.querySelector('.cell[aria-selected=true] [data-side=rejected]').src.includes('veil')"
    )


def test_filters_show_what_judges_doubt_and_what_is_left(review, folder):
    page = review.page
    review.press("/")
    page.locator("[name=judged]").select_option("doubtful")
    assert page.evaluate("() => reviewPage.shown.map(pair => pair.id)") == spoiled_ids(folder)
    review.press("Escape")  # back from the filters to the pairs
    review.press("f")
    review.press("/")
    page.locator("[name=review]").select_option("flipped")
    assert len(page.evaluate("() => reviewPage.shown")) == 0  # a flip has mended it: no doubt is left
    page.locator("[name=judged]").select_option("")
    assert page.evaluate("() => reviewPage.shown.map(pair => pair.id)") == spoiled_ids(folder)[:1]
    page.locator("#reset").click()
    page.wait_for_function("() => reviewPage.shown.length === 60")
    page.locator("[name=category]").select_option("hate")
    assert page.evaluate("() => reviewPage.shown.every(pair => pair.categories.includes('hate'))")
    page.locator("[name=category]").select_option("")
    page.locator("[name=judge]").select_option("toy-oracle")
    assert len(page.evaluate("() => reviewPage.shown")) == 60
    page.locator("[name=judged]").select_option("swapped")
    assert page.evaluate("() => reviewPage.shown.map(pair => pair.id)") == spoiled_ids(folder)[1:]


def test_zoom_compare_and_help_by_keyboard(review):
    page = review.page
    review.press("z")
    zoomed = "() => getComputedStyle(stage).getPropertyValue('--zoom')"
    assert page.evaluate(zoomed) == "2.5"
    review.press("Shift+ArrowRight")
    assert page.evaluate("() => stage.style.getPropertyValue('--x')") == "60%"
    review.press("Escape")
    assert page.evaluate(zoomed) == "1"
    review.press("c")
    review.press("]")
    assert page.evaluate("() => stage.style.getPropertyValue('--split')") == "55%"
    assert page.locator("#split").is_visible()
    review.press("Escape")
    assert not page.locator("#split").is_visible()
    review.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()


def test_a_server_that_is_gone_is_said_and_the_decision_can_be_made_again(review, server, folder):
    first = review.pair_id()
    server.process.kill()
    server.process.wait()
    review.press("a")
    assert "Not saved" in review.page.inner_text("#toast")
    assert review.pair_id() == first and review.reviewed() == 0
    with ReviewCommand(folder, port=int(server.url.split(":")[2].split("/")[0])):
        review.press("a")
        assert reviews_on_disk(folder)[first] == "accepted" and review.reviewed() == 1


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_is_readable_in_both_themes(chromium, server, scheme):
    page = chromium.new_page(color_scheme=scheme)
    opened = ReviewPage(page, server.url)
    opened.wait_for_first_picture()
    ratios = page.evaluate(
        """() => {
          const channels = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
          const light = colour => channels(colour).map(value => value / 255)
            .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
            .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
          const ground = element => {
            for (let at = element; at; at = at.parentElement) {
              const colour = getComputedStyle(at).backgroundColor;
              if (!/, 0\\)$/.test(colour)) return colour;
            }
          };
          return [...document.querySelectorAll('button, select, output, b, #facts span, #facts td, #facts th, label')]
            .filter(element => element.offsetParent && element.textContent.trim())
            .map(element => {
              const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
              return [element.textContent.trim().slice(0, 20), (a + 0.05) / (b + 0.05)];
            });
        }"""
    )
    assert len(ratios) > 15
    assert [entry for entry in ratios if entry[1] < 4.5] == []  # WCAG 2.2, 1.4.3 (AA)
    page.close()


def test_a_finger_holds_to_see_and_taps_to_decide(chromium, server, folder):
    context = chromium.new_context(has_touch=True, is_mobile=True, viewport={"width": 390, "height": 760})
    opened = ReviewPage(context.new_page(), server.url)
    opened.wait_for_first_picture()
    page = opened.page
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")
    touch = context.new_cdp_session(page)
    box = page.locator("figure[data-side=rejected] .frame").bounding_box()
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [at]})
    assert not opened.is_veiled("rejected")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert opened.is_veiled("rejected")
    for button in page.locator("footer button").all():
        assert button.bounding_box()["height"] >= 44
    page.locator("footer .flip").tap()
    page.evaluate("() => reviewPage.work")
    assert next(iter(reviews_on_disk(folder).values())) == "flipped"
    assert opened.errors == []
    context.close()


def test_everything_can_be_reached_by_the_tab_key(review):
    reached = set()
    for _ in range(40):
        review.page.keyboard.press("Tab")
        reached.add(review.page.evaluate("() => document.activeElement.id || document.activeElement.dataset.action"))
    assert {"dataset", "view", "veil", "menu", "theme", "help", "accept", "flip", "drop", "undo"} <= reached


def test_the_help_dialog_and_the_docs_list_the_same_keys(review):
    docs = (Path(__file__).resolve().parents[2] / "docs" / "review.md").read_text(encoding="utf-8")
    table = docs.split("| key | does |")[1].split("\n\n")[0].splitlines()[2:]
    listed = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in table]
    shown = review.page.evaluate(
        """() => [...document.querySelectorAll('#keys tr')].map(row => [
          [...row.querySelectorAll('kbd')].map(key => '`' + key.textContent + '`').join(' '),
          row.cells[1].textContent,
        ])"""
    )
    assert listed == [tuple(row) for row in shown]
