"""The page of experts and their cards, as aiohttp routes of ComfyUI's server.

Every path below `PREFIX`:

    GET /                                  the page
    GET /page/NAME                         its scripts and styles
    GET /list                              {"experts": [{"name", "categories", "state", "family", "has_preview"}, …]}
    GET /card?name=NAME                    `Card.to_json` with "pictures": [[step, number of pictures], …]
    GET /picture?name=NAME&step=N&number=N PNG, of the expert's training
    GET /preview?name=NAME                 PNG, beside the file
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from ...errors import InputError, SafetyExpertsError
from ...experts.card import CardNumber
from ...experts.info import METADATA_KEY, read_info
from ...preferences.reviewing.answers import count, guarded, page_file, parameter
from ...preferences.reviewing.requests import Refused
from ...tensor_file import TensorFile
from .cards import PREVIEW_SUFFIX, make_card, pictures_of
from .run_files import read_png, sample_path

PREFIX = "/safety_experts/experts"
_PAGE = Path(__file__).resolve().parents[2] / "web" / "cards"
_MOST = 10**9 - 1


class ExpertShelf(Protocol):
    """Where the experts are."""

    def names(self) -> list[str]:
        """Return the names of all LoRA files."""

    def path(self, name: str) -> Path:
        """Return the file of a name; an InputError where there is none."""


def add_card_routes(
    routes: web.RouteTableDef, shelf: ExpertShelf, numbers: Callable[[str], Sequence[CardNumber]]
) -> None:
    """Put the page's routes into a table.

    Args:
        numbers: a file's sha256 -> what evaluations found.
    """
    page = _CardRoutes(shelf, numbers)
    routes.get(f"{PREFIX}/")(guarded(page.page))
    routes.get(f"{PREFIX}/page/{{name}}")(guarded(page.page_file))
    routes.get(f"{PREFIX}/list")(guarded(page.list_experts))
    routes.get(f"{PREFIX}/card")(guarded(page.card))
    routes.get(f"{PREFIX}/picture")(guarded(page.picture))
    routes.get(f"{PREFIX}/preview")(guarded(page.preview))


class _CardRoutes:
    def __init__(self, shelf: ExpertShelf, numbers: Callable[[str], Sequence[CardNumber]]):
        self._shelf, self._numbers = shelf, numbers
        self._outlines: dict[tuple[str, int], dict[str, Any] | None] = {}  # (path, time of writing) -> what is listed
        self._lock = threading.Lock()

    async def page(self, request: web.Request) -> web.Response:
        return page_file(_PAGE, "index.html")

    async def page_file(self, request: web.Request) -> web.Response:
        return page_file(_PAGE, request.match_info["name"])

    async def list_experts(self, request: web.Request) -> web.Response:
        return web.json_response({"experts": await asyncio.to_thread(self._list)})

    async def card(self, request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(self._describe, self._path(request)))

    async def picture(self, request: web.Request) -> web.Response:
        path = self._path(request)
        step, number = count(request, "step", _MOST), count(request, "number", 999)
        return await self._png(sample_path(path, step, number))

    async def preview(self, request: web.Request) -> web.Response:
        return await self._png(self._path(request).with_suffix(PREVIEW_SUFFIX))

    async def _png(self, path: Path) -> web.Response:
        try:
            return web.Response(body=await asyncio.to_thread(read_png, path), content_type="image/png")
        except OSError:
            raise Refused(404, "there is no such picture") from None

    def _path(self, request: web.Request) -> Path:
        name = parameter(request, "name")
        if not name.endswith(".safetensors"):
            raise Refused(400, "an expert is a .safetensors file")
        return self._shelf.path(name)

    def _list(self) -> list[dict[str, Any]]:
        """Return what the files of this pack say of themselves, the newest first; other LoRAs are left out."""
        found = []
        with self._lock:
            for name in self._shelf.names():
                try:
                    path = self._shelf.path(name)
                    written = path.stat().st_mtime_ns
                except (OSError, InputError):
                    continue  # removed just now
                key = (str(path), written)
                if key not in self._outlines:
                    self._outlines[key] = _outline(path)
                if outline := self._outlines[key]:
                    preview = path.with_suffix(PREVIEW_SUFFIX).is_file()
                    found.append((written, {"name": name, "has_preview": preview, **outline}))
        return [expert for _, expert in sorted(found, key=lambda each: each[0], reverse=True)]

    def _describe(self, path: Path) -> dict[str, Any]:
        card = make_card(path)
        card = make_card(path, self._numbers(card.file.sha256))
        return {
            **card.to_json(),
            "pictures": pictures_of(path),
            "has_preview": path.with_suffix(PREVIEW_SUFFIX).is_file(),
        }


def _outline(path: Path) -> dict[str, Any] | None:
    try:
        metadata = TensorFile(path).metadata
        if METADATA_KEY not in metadata:
            return None
        info = read_info(metadata, path.name)
    except SafetyExpertsError:
        return None
    state = "" if info.trained is None else "finished" if info.trained.finished else "unfinished"
    return {"categories": list(info.categories), "family": info.base_checkpoint.family, "state": state}
