"""The review page in a real Chromium, driven by its keys, with times measured inside the page."""

import contextlib
import os
import re
from collections.abc import Iterator

from playwright.sync_api import Browser, Page, sync_playwright

ARGUMENTS = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# From the key's own time stamp to the frame that shows another pair: both pictures loaded, the frame painted.
_WATCH = """() => {
  const state = window.watched = {};
  const urls = () => [...document.querySelectorAll('#single .frame img')].map(image => image.src).join(' ');
  const isThere = () => {
    const images = [...document.querySelectorAll('#single .frame img')];
    return images.length >= 2 && images.every(image => image.complete && image.naturalWidth);
  };
  state.painted = (start, before) => new Promise(resolve => {
    const look = () => requestAnimationFrame(() => {
      if (urls() === before || !isThere()) return look();
      const channel = new MessageChannel();  // after the frame
      channel.port1.onmessage = () => resolve(performance.now() - start);
      channel.port2.postMessage(null);
    });
    look();
  });
  addEventListener('keydown', event => { state.next = state.painted(event.timeStamp, urls()); }, true);
}"""


class ReviewPage:
    """One open page; `errors` collects what the browser complains about."""

    def __init__(self, page: Page, url: str, query: str = ""):
        self.page, self.errors = page, []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.add_init_script(f"addEventListener('DOMContentLoaded', {_WATCH})")
        page.add_init_script("addEventListener('DOMContentLoaded', () => { watched.first = watched.painted(0, ''); })")
        page.goto(url + query)

    def wait_for_first_picture(self) -> float:
        """Return the milliseconds from the start of the navigation to the first pair on the screen."""
        return self.page.evaluate("() => watched.first")

    def press(self, key: str) -> None:
        """Press a key, and wait until the page has done what it asks for."""
        self.page.keyboard.press(key)
        self.page.evaluate("() => reviewPage.work")

    def press_to_next(self, key: str) -> float:
        """Press a key that leads to another pair; return the milliseconds from the key to that pair on the screen."""
        self.page.keyboard.press(key)
        return self.page.evaluate("() => watched.next")

    def reviewed(self) -> int:
        """Return how many pairs the page says are reviewed."""
        found = re.search(r"(\d+) of \d+ reviewed", self.page.inner_text("#counts"))
        assert found
        return int(found[1])

    def pair_id(self) -> str:
        """Return the id of the pair that is shown."""
        return self.page.evaluate("() => reviewPage.pair.id")

    def is_veiled(self, side: str) -> bool:
        """Return whether a side's picture is covered on the screen."""
        clear = self.page.locator(f"figure[data-side={side}] .clear")
        return clear.evaluate("image => getComputedStyle(image).visibility") == "hidden"


@contextlib.contextmanager
def open_chromium() -> Iterator[Browser]:
    """Start Chromium (`CHROMIUM` or /usr/bin/chromium), close it at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=ARGUMENTS
        )
        try:
            yield browser
        finally:
            browser.close()
