"""Save docs/screenshots/review_*.jpg: the review page over toy pairs, in a real Chromium.

python tests/browser/save_review_screenshots.py            (needs playwright and Chromium)
"""

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from review_browser import ReviewPage, open_chromium  # noqa: E402
from review_datasets import ReviewCommand, make_review_dataset  # noqa: E402

FOLDER = ROOT / "docs" / "screenshots"
DECIDED = "aafadaaafaadaa"


def main() -> None:
    """Take the four pictures: blurred, single (shown), grid, light theme."""
    with tempfile.TemporaryDirectory() as temporary, open_chromium() as browser:
        folder = make_review_dataset(Path(temporary) / "toy_pairs", 60, 512, spoiled=0.2)
        with ReviewCommand(folder) as server:
            page = _open(browser, server.url, "dark")
            for key in DECIDED:
                page.press_to_next(key)
            while page.is_veiled("chosen"):
                page.press("ArrowRight")
            _save(page, "blurred")
            page.press("b")
            _save(page, "single")
            page.press("b")
            page.press("g")
            page.press("Home")
            page.press("/")
            _save(page, "grid")
            page = _open(browser, server.url, "light")
            page.press("b")
            page.press("c")
            _save(page, "light")


def _open(browser, url: str, scheme: str) -> ReviewPage:
    page = ReviewPage(browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme), url)
    page.wait_for_first_picture()
    return page


def _save(page: ReviewPage, name: str) -> None:
    page.page.wait_for_load_state("networkidle")
    page.page.wait_for_function("() => [...document.images].every(image => image.naturalWidth)")
    page.page.wait_for_timeout(300)
    with Image.open(io.BytesIO(page.page.screenshot())) as picture:
        picture.convert("RGB").save(FOLDER / f"review_{name}.jpg", quality=80)


if __name__ == "__main__":
    main()
