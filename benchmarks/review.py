"""The review page at 2,000 pairs in a real Chromium: how fast it opens, goes on and saves, and what a kill loses.

    python benchmarks/review.py        (needs playwright and Chromium; four minutes)

Pictures are 512 px, drawn from the toy world. Opening is measured with no thumbnail made yet and, as a second number,
later; going on is measured from the key's own time stamp to the frame that shows the next pair's two pictures. A kill
is SIGKILL: after a decision that the page shows as made, and, as the harder case, at a random moment after the key.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from safety_experts.evaluation.machine import describe_machine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "review.json"
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from review_browser import ReviewPage, open_chromium  # noqa: E402
from review_datasets import ReviewCommand, make_review_dataset, reviews_on_disk  # noqa: E402

KEYS = {"a": "accepted", "f": "flipped", "d": "dropped"}


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--size", type=int, default=512, help="of the pictures in px")
    parser.add_argument("--decisions", type=int, default=200)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, open_chromium() as browser:
        folder = make_review_dataset(Path(temporary) / "toy", arguments.pairs, arguments.size, spoiled=0.2)
        with ReviewCommand(folder) as server:
            opening = [_open(browser, server.url, query) for query in ("", "", "", "", "", "?view=grid")]
            page = ReviewPage(browser.new_page(viewport={"width": 1366, "height": 768}), server.url)
            page.wait_for_first_picture()
            going_on = [page.press_to_next("ArrowRight") for _ in range(arguments.decisions)]
            page.press("Home")
            deciding, expected = _decide(page, folder, arguments.decisions)
            grid = _scroll_grid(page)
            browser_complaints = page.errors
        kills = _kill(browser, folder, arguments.kills)
    result = {
        "claim": "2,000 pairs: open to first picture <= 1.5 s, next pair <= 100 ms, no decision lost by a kill",
        "pairs": arguments.pairs,
        "picture_px": arguments.size,
        "first_picture_ms": {"first_visit": round(opening[0]), **_spread(opening[:-1])},
        "grid_first_picture_ms": round(opening[-1]),
        "next_pair_ms": _spread(going_on),
        "decision_to_next_pair_ms": _spread(deciding),
        "decisions": arguments.decisions,
        "decisions_found_in_metadata": expected,
        "grid_frame_while_scrolling_ms": _spread(grid),
        "kills": kills,
        "browser_errors": browser_complaints,
        **describe_machine("aiohttp", "playwright"),
        "chromium": kills.pop("chromium"),
    }
    print(json.dumps(result, indent=2))
    if kills["lost"] or expected != arguments.decisions or browser_complaints:
        raise SystemExit("a decision was lost, or the page complained")
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _open(browser, url: str, query: str) -> float:
    """Return the milliseconds from navigation to the first picture, in a browser profile without any cache."""
    context = browser.new_context(viewport={"width": 1366, "height": 768})
    try:
        page = ReviewPage(context.new_page(), url, query)
        if not query:
            return page.wait_for_first_picture()
        return page.page.evaluate(
            """() => new Promise(resolve => {
              const look = () => requestAnimationFrame(() =>
                document.querySelector('.cell img')?.naturalWidth ? resolve(performance.now()) : look());
              look();
            })"""
        )
    finally:
        context.close()


def _decide(page: ReviewPage, folder: Path, number: int) -> tuple[list[float], int]:
    """Decide on `number` pairs by keyboard; return the times, and how many of the decisions are on disk as meant."""
    draws = random.Random(0)
    times, meant = [], {}
    for _ in range(number):
        key = draws.choice(list(KEYS))
        meant[page.pair_id()] = KEYS[key]
        times.append(page.press_to_next(key))
    found = reviews_on_disk(folder)
    return times, sum(found[pair_id] == review for pair_id, review in meant.items())


def _scroll_grid(page: ReviewPage) -> list[float]:
    """Return the milliseconds between frames while the grid is scrolled from top to bottom, 400 px a frame."""
    page.press("g")
    return page.page.evaluate(
        """() => new Promise(resolve => {
          const grid = document.getElementById('grid'), times = [];
          let last = performance.now();
          const step = now => {
            times.push(now - last);
            last = now;
            const end = grid.scrollTop + grid.clientHeight >= grid.scrollHeight - 1;
            if (end || times.length > 400) return resolve(times.slice(1));
            grid.scrollTop += 400;
            requestAnimationFrame(step);
          };
          requestAnimationFrame(step);
        })"""
    )


def _kill(browser, folder: Path, number: int) -> dict:
    """Kill the server `number` times around decisions; count those that the page shows as made and the disk lacks."""
    draws = random.Random(1)
    lost = unreadable = repeated = 0
    port = 0
    page = None
    for index in range(number):
        with ReviewCommand(folder, port) as server:
            if page is None:  # the same page goes on with every new server, as a reviewer's would
                port = int(server.url.split(":")[2].split("/")[0])
                page = ReviewPage(browser.new_page(), server.url)
                page.wait_for_first_picture()
                page.press("n")
            key = draws.choice(list(KEYS))
            pair_id = page.pair_id()
            if index % 2:
                page.press(key)
            else:
                page.page.keyboard.press(key)
                time.sleep(draws.uniform(0, 0.1))
        try:
            found = reviews_on_disk(folder).get(pair_id)
        except ValueError:
            unreadable += 1
            continue
        page.page.evaluate("() => reviewPage.work")
        shown = page.page.evaluate("id => reviewPage.pairs.find(pair => pair.id === id).review", pair_id)
        lost += shown is not None and found != shown
        repeated += shown is None  # not answered: the page says so and stays, and the key is pressed again
        if shown is None:
            with ReviewCommand(folder, port):
                page.press(key)
                lost += reviews_on_disk(folder).get(pair_id) != KEYS[key]
    return {
        "number": number,
        "lost": lost,
        "unreadable": unreadable,
        "unanswered_and_said_so": repeated,
        "chromium": browser.version,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 1),
        "p95": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 1),
        "max": round(ordered[-1], 1),
    }


if __name__ == "__main__":
    main()
