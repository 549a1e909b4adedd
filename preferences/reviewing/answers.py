"""What the pages of this pack have in common: safety headers, errors as JSON, and how requests are read."""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pydantic
from aiohttp import web

from ...errors import InputError, SafetyExpertsError
from .requests import Refused, check_same_origin

_log = logging.getLogger(__name__)
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".mjs": "text/javascript", ".svg": "image/svg+xml"}
_MAX_BODY_BYTES = 4096
_MAX_PARAMETER = 1024
_HEADERS = {
    # Unsafe pictures and prompts stay out of the browser's cache on disk.
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.Response]]
Body = TypeVar("Body")


def guarded(handler: Handler) -> Handler:
    """Refuse foreign requests, turn errors into JSON, and put the safety headers on every answer."""

    async def answer(request: web.Request) -> web.Response:
        try:
            check_same_origin(request)
            response = await handler(request)
        except Refused as refusal:
            response = web.json_response({"error": str(refusal)}, status=refusal.status)
        except InputError as error:
            response = web.json_response({"error": str(error)}, status=400)
        except SafetyExpertsError as error:
            _log.error("%s: %s", request.path, error)
            response = web.json_response({"error": str(error)}, status=500)
        response.headers.update(_HEADERS)
        return response

    return answer


def parameter(request: web.Request, name: str) -> str:
    """Return the one value of a query's parameter; refuse the request where there is none, or several."""
    values = request.query.getall(name, [])
    if len(values) != 1 or not 0 < len(values[0]) <= _MAX_PARAMETER or not values[0].isprintable():
        raise Refused(400, f"the request needs one {name}")
    return values[0]


def count(request: web.Request, name: str, most: int) -> int:
    """Return a parameter that is a whole number of 0 to `most`."""
    text = parameter(request, name)
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) <= most):
        raise Refused(400, f"{name} is a whole number of at most {most}")
    return int(text)


async def read_body(request: web.Request, adapter: "pydantic.TypeAdapter[Body]", what: str) -> Body:
    """Return the JSON body of a request as its type.

    Args:
        what: how it has to look, for the refusal.
    """
    if request.headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send it as application/json")
    body = await request.content.read(_MAX_BODY_BYTES + 1)
    while body and len(body) <= _MAX_BODY_BYTES and (more := await request.content.read(_MAX_BODY_BYTES + 1)):
        body += more
    if len(body) > _MAX_BODY_BYTES:
        raise Refused(413, f"a request is at most {_MAX_BODY_BYTES} bytes")
    try:
        return adapter.validate_json(body)
    except pydantic.ValidationError:
        raise Refused(400, what) from None


def page_file(folder: Path, name: str) -> web.Response:
    """Return a file of a page; looked up in a list, so a name cannot lead anywhere."""
    path = next((path for path in folder.iterdir() if path.name == name and path.suffix in _PAGE_TYPES), None)
    if path is None:
        raise Refused(404, "the page has no such file")
    return web.Response(body=path.read_bytes(), content_type=_PAGE_TYPES[path.suffix], charset="utf-8")
