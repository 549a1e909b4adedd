"""`safety-experts review`: look at a dataset's pairs in the browser, and accept, flip or drop them."""

import argparse
import contextlib
import json
import webbrowser
from pathlib import Path

HELP = "look at a dataset's pairs in the browser: accept, flip, drop"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a dataset folder")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="port on 127.0.0.1 (default: any free one)")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--json", action="store_true", help="print the page's address as JSON")


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl+C."""
    from ..preferences.reviewing.server import serve_review

    def announce(url: str) -> None:
        text = json.dumps({"url": url}) if arguments.json else f"{url}  (Ctrl+C ends; every decision is saved at once)"
        print(text, flush=True)
        if arguments.open:
            webbrowser.open(url)

    with contextlib.suppress(KeyboardInterrupt):
        serve_review(arguments.folder, arguments.port, announce)
