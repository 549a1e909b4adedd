"""The run page and what the training panel asks for, as aiohttp routes of ComfyUI's server.

Every path below `PREFIX`:

    GET  /                                the page
    GET  /page/NAME                       its scripts and styles
    GET  /runs                            {"runs": [{"name", "is_active", "state", "step", …}, …]}, the newest first
    GET  /state?run=NAME&since=N          `describe_run` with "is_active", "takes", "waiting"
    GET  /sample?run=NAME&step=N&number=N PNG
    POST /ask  {"run", "request"}         request: stop, sample, save
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pydantic
from aiohttp import web

from ...errors import InputError
from ...preferences.reviewing.answers import count, guarded, page_file, parameter, read_body
from ...preferences.reviewing.requests import Refused
from .recorder import RunRecorder
from .run_files import describe_run, read_png, read_state, sample_path

PREFIX = "/safety_experts/run"
_PAGE = Path(__file__).resolve().parents[2] / "web" / "training"
_MOST_RUNS = 100
_MOST = 10**9 - 1


class Runs(Protocol):
    """Where the trainings are."""

    def names(self) -> list[str]:
        """Return the names of trainings, the newest first."""

    def expert(self, name: str) -> Path:
        """Return the file that a training writes; an InputError where the name is none or leads elsewhere."""

    def active(self, name: str) -> RunRecorder | None:
        """Return the recorder of a training that runs in this server."""


@dataclass(frozen=True)
class _Request:
    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", strict=True)

    run: str
    request: str


_REQUEST: pydantic.TypeAdapter[_Request] = pydantic.TypeAdapter(_Request)


def add_run_routes(routes: web.RouteTableDef, runs: Runs) -> None:
    """Put the page's routes into a table."""
    page = _RunRoutes(runs)
    routes.get(f"{PREFIX}/")(guarded(page.page))
    routes.get(f"{PREFIX}/page/{{name}}")(guarded(page.page_file))
    routes.get(f"{PREFIX}/runs")(guarded(page.list_runs))
    routes.get(f"{PREFIX}/state")(guarded(page.state))
    routes.get(f"{PREFIX}/sample")(guarded(page.sample))
    routes.post(f"{PREFIX}/ask")(guarded(page.ask))


class _RunRoutes:
    def __init__(self, runs: Runs):
        self._runs = runs

    async def page(self, request: web.Request) -> web.Response:
        return page_file(_PAGE, "index.html")

    async def page_file(self, request: web.Request) -> web.Response:
        return page_file(_PAGE, request.match_info["name"])

    async def list_runs(self, request: web.Request) -> web.Response:
        return web.json_response({"runs": await asyncio.to_thread(self._list)})

    async def state(self, request: web.Request) -> web.Response:
        name, since = parameter(request, "run"), count(request, "since", _MOST)
        return web.json_response(await asyncio.to_thread(self._describe, name, since))

    async def sample(self, request: web.Request) -> web.Response:
        name = parameter(request, "run")
        step, number = count(request, "step", _MOST), count(request, "number", 999)
        body = await asyncio.to_thread(self._read_sample, name, step, number)
        return web.Response(body=body, content_type="image/png")

    async def ask(self, request: web.Request) -> web.Response:
        asked = await read_body(request, _REQUEST, "a request is {run, request: stop, sample or save}")
        recorder = self._runs.active(asked.run)
        if recorder is None:
            raise Refused(409, "this training is not running any more")
        recorder.ask(asked.request)
        return web.json_response({"waiting": recorder.waiting})

    def _list(self) -> list[dict[str, Any]]:
        found = []
        for name in self._runs.names()[:_MOST_RUNS]:
            try:
                state = read_state(self._runs.expert(name))
            except InputError:
                continue  # a damaged record hides no other
            shown = state.model_dump(mode="json", include={"state", "step", "num_steps", "started", "categories"})
            found.append({"name": name, "is_active": self._runs.active(name) is not None, **shown})
        return found

    def _describe(self, name: str, since: int) -> dict[str, Any]:
        described = describe_run(self._expert(name), since)
        recorder = self._runs.active(name)
        takes, waiting = (list(recorder.takes), recorder.waiting) if recorder else ([], [])
        return {"name": name, "is_active": recorder is not None, "takes": takes, "waiting": waiting, **described}

    def _read_sample(self, name: str, step: int, number: int) -> bytes:
        try:
            return read_png(sample_path(self._expert(name), step, number))
        except OSError:
            raise Refused(404, "there is no such sample") from None

    def _expert(self, name: str) -> Path:
        try:
            return self._runs.expert(name)
        except (OSError, ValueError):  # names too long, …
            raise InputError("no training of this name") from None
