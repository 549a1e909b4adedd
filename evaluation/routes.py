"""Reports over HTTP, for a server that has them: named files only, in a sandbox, since prompts are untrusted text.

GET /safety_experts/report/NAME/report.html   also report-shared.html, report.json and the pictures it links to
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import path_inside
from .report import DATA_NAME, PAGE_NAME, SHARED_NAME

PREFIX = "/safety_experts/report"
_NAME = re.compile(r"[\w][\w .+@-]{0,127}")
_TYPES = {PAGE_NAME: "text/html", SHARED_NAME: "text/html", DATA_NAME: "application/json"}
_PICTURE = re.compile(r"images/[\w@.,+-]+/[\w.-]+/[0-9a-f]{16}-\d{1,6}\.png")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "sandbox allow-scripts allow-popups; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def find_file(folder_of: Callable[[str], Path], name: str, file: str) -> tuple[Path, str] | None:
    """Return the path and the type of a file of a report; None for anything else.

    Args:
        folder_of: name of an evaluation -> its folder; raises an InputError where the name leaves its place.
    """
    kind = _TYPES.get(file) or ("image/png" if _PICTURE.fullmatch(file) else None)
    if kind is None or not _NAME.fullmatch(name):
        return None
    try:
        path = path_inside(folder_of(name), file)
    except InputError:
        return None
    return (path, kind) if path.is_file() else None


def add_report_routes(routes: Any, folder_of: Callable[[str], Path]) -> None:
    """Add the routes to aiohttp's table of a server."""
    from aiohttp import web

    class Confined(web.FileResponse):
        """A file under our headers, also where the server's own middleware has put others in their place."""

        async def prepare(self, request: Any) -> Any:
            self.headers.update(_HEADERS)
            return await super().prepare(request)

    @routes.get(PREFIX + "/{name}/{file:.+}")
    async def report(request: web.Request) -> web.StreamResponse:
        found = find_file(folder_of, request.match_info["name"], request.match_info["file"])
        if found is None:
            return web.Response(status=404, headers=_HEADERS)
        path, kind = found
        return Confined(path, headers={"Content-Type": kind})
