"""The review page and what it asks for, as aiohttp routes: in ComfyUI's server, and in `safety-experts review`.

Every path below `PREFIX`:

    GET  /                                              the page
    GET  /page/NAME                                     its scripts and style
    GET  /datasets                                      {"datasets": [name, …]}
    GET  /pairs?dataset=NAME                            {"pairs": [{…}, …]} in file order
    GET  /image?dataset=NAME&id=ID&side=SIDE&size=SIZE  side: chosen, rejected; size: full, thumbnail, veil
    POST /review  {"dataset", "id", "review"}           answered once the decision is on disk
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pydantic
from aiohttp import web

from ...errors import InputError
from ..dataset import PreferenceDataset
from ..records import PreferencePair, Review
from .answers import guarded, page_file, parameter, read_body
from .requests import Refused
from .thumbnails import FORMATS, make_veil, read_thumbnail

PREFIX = "/safety_experts/review"

_PAGE = Path(__file__).resolve().parents[2] / "web" / "review"
_MAX_OPEN = 4


class Library(Protocol):
    """Where the datasets are."""

    def names(self) -> list[str]:
        """Return the names of the datasets."""

    def folder(self, name: str) -> Path:
        """Return the folder of a dataset; an InputError where the name is none or leads elsewhere."""


@dataclass(frozen=True)
class Folder:
    """The library that is one dataset folder, called by its own name."""

    path: Path

    def names(self) -> list[str]:
        return [self.path.name]

    def folder(self, name: str) -> Path:
        if name != self.path.name:
            raise InputError("no such dataset here; open the page anew")
        return self.path


@dataclass(frozen=True)
class _Decision:
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    dataset: str
    id: str
    review: Review | None


_DECISION = pydantic.TypeAdapter(_Decision)


def add_review_routes(routes: web.RouteTableDef, library: Library) -> None:
    """Put the page's routes into a table."""
    review = _ReviewRoutes(library)
    routes.get(f"{PREFIX}/")(guarded(review.page))
    routes.get(f"{PREFIX}/page/{{name}}")(guarded(review.page_file))
    routes.get(f"{PREFIX}/datasets")(guarded(review.datasets))
    routes.get(f"{PREFIX}/pairs")(guarded(review.pairs))
    routes.get(f"{PREFIX}/image")(guarded(review.image))
    routes.post(f"{PREFIX}/review")(guarded(review.decide))


class _ReviewRoutes:
    def __init__(self, library: Library):
        self._library = library
        self._datasets: dict[Path, PreferenceDataset] = {}
        self._lock = threading.Lock()  # around every use of a dataset: a decision rewrites its list of pairs

    async def page(self, request: web.Request) -> web.Response:
        return page_file(_PAGE, "index.html")

    async def page_file(self, request: web.Request) -> web.Response:
        return page_file(_PAGE, request.match_info["name"])

    async def datasets(self, request: web.Request) -> web.Response:
        return web.json_response({"datasets": await asyncio.to_thread(self._library.names)})

    async def pairs(self, request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(self._describe_pairs, parameter(request, "dataset")))

    async def image(self, request: web.Request) -> web.Response:
        name, pair_id, side, size = (parameter(request, key) for key in ("dataset", "id", "side", "size"))
        if side not in ("chosen", "rejected") or size not in ("full", "thumbnail", "veil"):
            raise Refused(400, "side is chosen or rejected, size is full, thumbnail or veil")
        body, content_type = await asyncio.to_thread(self._read_image, name, pair_id, side, size)
        return web.Response(body=body, content_type=content_type)

    async def decide(self, request: web.Request) -> web.Response:
        what = "a decision is {dataset, id, review: accepted, flipped, dropped or null}"
        decision = await read_body(request, _DECISION, what)
        # Shielded: a closed tab cancels the request, not the writing.
        await asyncio.shield(asyncio.to_thread(self._write, decision))
        return web.json_response({"id": decision.id, "review": decision.review})

    @contextlib.contextmanager
    def _dataset(self, name: str) -> Iterator[PreferenceDataset]:
        """Yield the dataset as it is on disk now; opened once, then only read where it changed."""
        with self._lock:
            try:
                folder = self._library.folder(name)
                dataset = self._datasets.pop(folder, None)
                if dataset is None:
                    dataset = PreferenceDataset.open(folder)
                else:
                    dataset.refresh()
            except (OSError, ValueError) as error:  # names too long, with null characters, …
                reason = getattr(error, "strerror", None) or error
                raise InputError(f"cannot open the dataset: {reason}; check its name") from None
            self._datasets[folder] = dataset  # the last used stands last
            while len(self._datasets) > _MAX_OPEN:
                del self._datasets[next(iter(self._datasets))]
            yield dataset

    def _describe_pairs(self, name: str) -> dict[str, Any]:
        with self._dataset(name) as dataset:
            return {"pairs": [_describe(pair) for pair in dataset.pairs]}

    def _read_image(self, name: str, pair_id: str, side: str, size: str) -> tuple[bytes, str]:
        with self._dataset(name) as dataset:
            chosen, rejected = dataset.image_paths(dataset.pair(pair_id))
        path = chosen if side == "chosen" else rejected
        if size == "full":
            return _read_picture(path)
        thumbnail = read_thumbnail(dataset.folder, path)
        return (make_veil(thumbnail), "image/png") if size == "veil" else (thumbnail, "image/jpeg")

    def _write(self, decision: _Decision) -> None:
        with self._dataset(decision.dataset) as dataset:
            dataset.set_review(decision.id, decision.review)


def _describe(pair: PreferencePair) -> dict[str, Any]:
    names = ("id", "prompt", "safe_prompt", "categories", "chosen_unsafe", "rejected_unsafe", "scores", "review")
    return {name: getattr(pair, name) for name in (*names, "seed", "width_px", "height_px")}


def _read_picture(path: Path) -> tuple[bytes, str]:
    """Return a picture's bytes and content type; what is no picture is never sent, whatever it is called."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; put the image back, or drop its pair") from None
    for name, start in FORMATS.items():
        if data.startswith(start):
            return data, f"image/{name.lower()}"
    raise InputError(f"{path}: is not a {' or '.join(FORMATS)} image; replace it, or drop its pair")
