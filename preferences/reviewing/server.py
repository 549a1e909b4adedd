"""The review page without ComfyUI: one dataset, on this machine's own address only."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from ...errors import SafetyExpertsError
from ..dataset import PreferenceDataset
from .routes import PREFIX, Folder, add_review_routes

_HOST = "127.0.0.1"


def serve_review(folder: Path, port: int, on_start: Callable[[str], None]) -> None:
    """Serve the page for one dataset until the process is interrupted.

    Args:
        folder: the dataset.
        port: 0 for any free one.
        on_start: called with the page's URL once it answers.

    Raises:
        InputError: the folder is no dataset, or a line of it is wrong.
        SafetyExpertsError: the port is taken.
    """
    folder = folder.resolve()
    PreferenceDataset.open(folder)
    asyncio.run(_serve(folder, port, on_start))


async def _serve(folder: Path, port: int, on_start: Callable[[str], None]) -> None:
    routes = web.RouteTableDef()
    add_review_routes(routes, Folder(folder))
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, _HOST, port)
        try:
            await site.start()
        except OSError as error:
            reason = error.strerror or error
            raise SafetyExpertsError(f"port {port}: {reason}; choose another --port, or leave it out") from error
        on_start(f"http://{_HOST}:{runner.addresses[0][1]}{PREFIX}/")
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
