"""Run the real, unmodified ComfyUI server headless and drive it over HTTP, for the demo and the tests."""

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, SafetyExpertsError
from .comfyui_messages import describe_refusal, failure_of
from .comfyui_source import ComfyUINotFound, is_comfyui, locate_comfyui

PACK_FOLDER = "safety-experts"
_PACK_ROOT = Path(__file__).resolve().parents[1]
# What the server logs, without failing, when the pack or one of its files did not load.
_LOG_ALARMS = ("IMPORT FAILED", "lora key not loaded")
_PREVIEW_IMAGE = 1  # ComfyUI protocol.py, BinaryEventTypes
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_POLL_SECONDS = 0.2
_ASK_AGAIN_SECONDS = 3
_START_TIMEOUT_SECONDS = 300
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", "SAFETY_EXPERTS_ENDS_WITH_STDIN": "1"}
# A proxy from the environment must not stand between us and our own machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def find_comfyui() -> Path:
    """Return the ComfyUI to use: `COMFYUI_PATH`, else the one this pack is installed in, else v0.30.0, fetched once.

    Raises:
        InputError: `COMFYUI_PATH` is not a ComfyUI, or none could be fetched.
    """
    try:
        return locate_comfyui()
    except ComfyUINotFound as error:
        raise InputError(str(error)) from error


def check_comfyui(path: str | os.PathLike) -> Path:
    """Return a ComfyUI's folder that the user named.

    Raises:
        InputError: it is none.
    """
    found = Path(path).expanduser().resolve()
    if not is_comfyui(found):
        raise InputError(f"{path} is not a ComfyUI folder; name the one that holds ComfyUI's main.py")
    return found


class ComfyServer:
    """A ComfyUI server with this pack as its only custom node, running inside the `with` block.

    Args:
        base_directory: where its models, inputs, outputs and log are; default a temporary folder, removed afterwards
            unless the block failed.
        comfyui: the ComfyUI folder; default `find_comfyui()`.
        cpu: run on the CPU; default: only when there is no CUDA device.
        extra_arguments: further arguments of ComfyUI's main.py.
        environment: variables for the server, beside those of this process.

    Raises:
        SafetyExpertsError: the server did not start, or stopped; the message ends with the path of its log.
    """

    def __init__(
        self,
        base_directory: str | os.PathLike | None = None,
        *,
        comfyui: Path | None = None,
        cpu: bool | None = None,
        extra_arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self.comfyui = comfyui or find_comfyui()
        self._is_temporary = base_directory is None
        self.base_directory = Path(base_directory or tempfile.mkdtemp(prefix="safety-experts-")).resolve()
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = self.base_directory / "comfyui.log"
        self._cpu = _has_no_cuda() if cpu is None else cpu
        self._extra_arguments = tuple(extra_arguments)
        self._environment = dict(environment or {})
        self._client_id = uuid.uuid4().hex
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "ComfyServer":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, error_type: type[BaseException] | None, *rest: object) -> None:
        self._stop()
        if self._is_temporary and error_type is None:
            shutil.rmtree(self.base_directory, ignore_errors=True)

    def add_model(self, path: str | os.PathLike, kind: str = "checkpoints") -> str:
        """Make a model file available without copying it; return the name workflows know it by."""
        source = Path(path).resolve()
        target = self.base_directory / "models" / kind / Path(path).name  # a link's own: its target may lack the ending
        if target.exists() and target.samefile(source):
            return target.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another file system
            target.symlink_to(source)
        return target.name

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a workflow in API format; return its prompt id.

        Raises:
            SafetyExpertsError: ComfyUI refuses it; the message names each node and what is wrong with it.
        """
        try:
            answer = json.loads(self._request("/prompt", {"prompt": prompt, "client_id": self._client_id}))
        except urllib.error.HTTPError as error:
            answer = json.loads(error.read())
        if "prompt_id" not in answer or answer.get("node_errors"):
            raise SafetyExpertsError(f"ComfyUI refused the workflow: {describe_refusal(answer)}; correct these nodes")
        return answer["prompt_id"]

    def wait(
        self,
        prompt_id: str,
        timeout_seconds: float = 1800,
        on_progress: Callable[[str, int, int], None] | None = None,
        on_preview: Callable[[bytes], None] | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Wait for a queued workflow; return its history entry (`outputs`, `status`, …).

        Args:
            prompt_id: from `queue`.
            timeout_seconds: when to give up; the workflow is interrupted then.
            on_progress: called with node id, value and maximum.
            on_preview: called with each live picture (JPEG or PNG bytes).
            on_event: called with the name and the data of every other message.
            should_stop: asked again and again; the workflow is interrupted when it says so.

        Raises:
            InputError: a node says that its input is wrong.
            InterruptedWorkflowError: it was interrupted.
            SafetyExpertsError: a node failed (the message is the node's), or the time is up.
        """
        return self._wait(lambda: prompt_id, timeout_seconds, on_progress, on_preview, on_event, should_stop)

    def run(
        self,
        prompt: dict[str, Any],
        timeout_seconds: float = 1800,
        on_progress: Callable[[str, int, int], None] | None = None,
        on_preview: Callable[[bytes], None] | None = None,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Queue a workflow and wait for it, listening from the start; see `queue` and `wait`."""
        return self._wait(lambda: self.queue(prompt), timeout_seconds, on_progress, on_preview, on_event, should_stop)

    def _wait(self, start: Callable[[], str], *following: Any) -> dict[str, Any]:
        entry = asyncio.run(self._follow(start, *following))
        if entry["status"]["status_str"] != "success":
            raise failure_of(entry["status"]["messages"])
        return entry

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """Return the history entry of a finished workflow, failed ones included; None while it waits or runs."""
        return json.loads(self._request(f"/history/{prompt_id}")).get(prompt_id)

    def interrupt(self) -> None:
        """Cancel the running workflow, as the user's Cancel button does."""
        self._request("/interrupt", {})

    def object_info(self) -> dict[str, dict[str, Any]]:
        """Return every node's description by node id."""
        return json.loads(self._request("/object_info"))

    def view(self, image: dict[str, str]) -> bytes:
        """Return the bytes of an image that a history entry's `outputs` names (`filename`, `subfolder`, `type`)."""
        return self._request("/view?" + urllib.parse.urlencode(image))

    @property
    def process_id(self) -> int:
        """Of the running server."""
        assert self._process, "only inside `with`"
        return self._process.pid

    def log_text(self) -> str:
        """Return what the server has logged so far."""
        return _COLOUR.sub("", self.log_path.read_text(encoding="utf-8", errors="replace"))

    def check_log(self) -> None:
        """Raise SafetyExpertsError when the log says that the pack, or a LoRA's key, did not load."""
        for line in self.log_text().splitlines():
            if any(alarm in line for alarm in _LOG_ALARMS):
                raise SafetyExpertsError(f"ComfyUI logged {line.strip()!r}; see {self.log_path}")

    def _start(self) -> None:
        for name in ("models/checkpoints", "custom_nodes", "input", "output", "user"):
            (self.base_directory / name).mkdir(parents=True, exist_ok=True)
        _link_pack(self.base_directory / "custom_nodes")
        command = [sys.executable, str(self.comfyui / "main.py"), "--port", str(self.port)]
        command += ["--base-directory", str(self.base_directory), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", "--disable-all-custom-nodes"]
        command += ["--whitelist-custom-nodes", PACK_FOLDER]
        if self._cpu:
            command.append("--cpu")
        command += self._extra_arguments
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                stdin=subprocess.PIPE,  # held open as long as we live: nodes/host/command.py
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_ENVIRONMENT, **self._environment},
                # A Ctrl-C in the terminal is for us: the server is asked to stop, and saves what there is.
                start_new_session=os.name == "posix",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        deadline = time.monotonic() + _START_TIMEOUT_SECONDS
        while True:
            self._check_alive()
            with contextlib.suppress(SafetyExpertsError):
                self._request("/system_stats")
                return
            if time.monotonic() > deadline:
                raise self._error(f"ComfyUI did not answer within {_START_TIMEOUT_SECONDS} s")
            time.sleep(_POLL_SECONDS)

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        self._process = None

    async def _follow(
        self,
        start: Callable[[], str],
        timeout_seconds: float,
        on_progress: Callable[[str, int, int], None] | None,
        on_preview: Callable[[bytes], None] | None,
        on_event: Callable[[str, dict[str, Any]], None] | None,
        should_stop: Callable[[], bool],
    ) -> dict[str, Any]:
        import aiohttp  # one of ComfyUI's own requirements, so it is there whenever the server runs

        async def take_message() -> bool:
            """Hand on the next message; False when there is none for a while."""
            try:
                message = await messages.receive(timeout=_POLL_SECONDS)
            except asyncio.TimeoutError:
                return False
            if message.type is aiohttp.WSMsgType.TEXT:
                event = json.loads(message.data)
                if on_event:
                    on_event(event["type"], event["data"])
                if on_progress and event["type"] == "progress" and event["data"]["prompt_id"] == prompt_id:
                    on_progress(event["data"]["node"], event["data"]["value"], event["data"]["max"])
            elif message.type is aiohttp.WSMsgType.BINARY and on_preview:
                if int.from_bytes(message.data[:4], "big") == _PREVIEW_IMAGE:
                    on_preview(message.data[8:])
            elif message.type is aiohttp.WSMsgType.CLOSED:
                await asyncio.sleep(_POLL_SECONDS)
                return False
            return True

        deadline = time.monotonic() + timeout_seconds
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId={self._client_id}", max_msg_size=0) as messages,
        ):
            prompt_id = start()
            asked_at = -math.inf
            # Messages are only for show; whether the work is done is asked of the history.
            while (entry := self.history(prompt_id)) is None:
                self._check_alive()
                if should_stop() and time.monotonic() > asked_at + _ASK_AGAIN_SECONDS:
                    asked_at = time.monotonic()  # ComfyUI forgets what was asked before a workflow started
                    self.interrupt()
                if time.monotonic() > deadline:
                    self.interrupt()
                    raise self._error(f"the workflow did not finish within {timeout_seconds:.0f} s and was interrupted")
                await take_message()
            while on_event and await take_message():
                pass  # what it said last
            return entry

    def _request(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            return _opener.open(request, timeout=60).read()
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise self._error(f"ComfyUI does not answer ({error})") from error

    def _check_alive(self) -> None:
        if self._process and self._process.poll() is not None:
            raise self._error(f"ComfyUI stopped with exit code {self._process.returncode}")

    def _error(self, what: str) -> SafetyExpertsError:
        lines = [line.strip() for line in self.log_text().splitlines() if line.strip()]
        last = f"; its last line was {lines[-1]!r}" if lines else ""
        remedy = ""
        if lines and "ModuleNotFoundError" in lines[-1]:
            remedy = f"; install {self.comfyui / 'requirements.txt'} with {sys.executable} -m pip"
        return SafetyExpertsError(f"{what}{last}{remedy}; the log is {self.log_path}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _has_no_cuda() -> bool:
    import torch  # slow to import, and not needed to read this module

    return not torch.cuda.is_available()


def _link_pack(custom_nodes: Path) -> None:
    link = custom_nodes / PACK_FOLDER
    if link.exists() and link.samefile(_PACK_ROOT):
        return
    if link.is_symlink() or link.exists():
        raise InputError(f"{link} is another copy of the pack; remove it, or choose another base directory")
    try:
        link.symlink_to(_PACK_ROOT, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        # Windows allows links only to administrators and developers, junctions to everybody.
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(_PACK_ROOT)], check=True, capture_output=True)
