"""A language model behind an OpenAI-compatible address that the user runs: Ollama, llama.cpp, vLLM, SGLang, LM Studio.

Nothing is sent anywhere but to that address, and only to this machine unless the user allows another one.
"""

import ipaddress
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from .errors import InputError, SafetyExpertsError

API_KEY_VARIABLE = "SAFETY_EXPERTS_API_KEY"
_MAX_ANSWER_BYTES = 1 << 22
_WAIT_SECONDS = 1.0

Answer = TypeVar("Answer")


class InvalidAnswerError(Exception):
    """The model answered, but not what was asked for; asking again may help."""


@dataclass(frozen=True)
class Request:
    """What a language model is asked.

    Args:
        messages: as the OpenAI API has them, from role to content.
        schema: JSON schema of the answer, for models that can be held to one.
        temperature: 0 for the likeliest answer.
        seed: the same one gives the same answer, where the model can.
    """

    messages: list[dict[str, Any]]
    schema: dict[str, Any]
    max_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0


class TextModel(Protocol):
    """A language model, wherever it runs.

    Attributes:
        name: what is recorded of it.
    """

    @property
    def name(self) -> str: ...

    def complete(self, request: Request) -> str:
        """Return the model's answer; nothing of it is checked."""


def ask(model: TextModel, request: Request, validate: Callable[[str], Answer], retries: int = 2) -> Answer | None:
    """Return `validate(the model's answer)`; None when no answer was valid after all retries.

    Args:
        validate: raises `InvalidAnswerError` for an answer to ask for again; the seed changes with each try.
    """
    for attempt in range(retries + 1):
        answer = model.complete(replace(request, seed=request.seed + attempt))
        try:
            return validate(answer)
        except InvalidAnswerError:
            continue
    return None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:  # a picture must not travel on to another machine
        return None


@dataclass(frozen=True)
class Endpoint:
    """An address such as `http://127.0.0.1:11434/v1`, and the model to ask there.

    An API key, where the server wants one, is taken from the environment variable SAFETY_EXPERTS_API_KEY, so that it
    never stands in a workflow or a report.

    Raises:
        InputError: no http(s) address, or one of another machine without `allow_remote`.
    """

    url: str
    model: str
    allow_remote: bool = False
    timeout_seconds: float = 120.0
    retries: int = 2

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise InputError(f"url {self.url!r}: write an address such as http://127.0.0.1:11434/v1")
        if not self.allow_remote and not _is_loopback(parts.hostname):
            raise InputError(
                f"url {self.url!r} is not on this machine, and what is asked would leave it; allow_remote allows that"
            )

    @property
    def name(self) -> str:
        return self.model

    def complete(self, request: Request) -> str:
        """Return the model's answer; servers that cannot enforce the schema are asked without it.

        Raises:
            SafetyExpertsError: nobody answers, or the server refuses the request, key or model.
        """
        return self._post(
            {
                "model": self.model,
                "messages": request.messages,
                "temperature": request.temperature,
                "max_tokens": request.max_tokens,
                "seed": request.seed,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "answer", "strict": True, "schema": request.schema},
                },
            }
        )

    def _post(self, body: dict[str, Any]) -> str:
        for attempt in range(self.retries + 1):
            try:
                return self._post_once(body)
            except urllib.error.HTTPError as error:
                if error.code == 400 and "response_format" in body:
                    body = {key: value for key, value in body.items() if key != "response_format"}
                    return self._post(body)
                if error.code < 500 and error.code != 429:
                    raise SafetyExpertsError(f"{self.url} refused the request: {_reason(error)}") from None
                problem = f"HTTP {error.code}"
            except (OSError, ValueError, KeyError, TypeError, IndexError) as error:  # URLError is an OSError
                problem = " ".join(str(getattr(error, "reason", error)).split())[:200] or type(error).__name__
            if attempt < self.retries:
                time.sleep(_WAIT_SECONDS * 2**attempt)
        raise SafetyExpertsError(f"no answer from {self.url} ({problem}); start the server, or correct url and model")

    def _post_once(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        # No proxy: the address is on this machine, or one that the user named.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
        with opener.open(request, timeout=self.timeout_seconds) as response:
            answer = json.loads(response.read(_MAX_ANSWER_BYTES))
        content = answer["choices"][0]["message"]["content"]
        return content if isinstance(content, str) else ""  # null: some servers' refusal


def json_in(text: str) -> Any:
    """Return the JSON value of an answer, also from inside a ```json fence.

    Raises:
        InvalidAnswerError: it holds none.
    """
    fenced = re.search(r"```(?:json)?\s*(.*?)```", text, re.DOTALL)
    try:
        return json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        raise InvalidAnswerError from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: urllib.error.HTTPError) -> str:
    # The body may quote the prompt, so only the code is passed on.
    hints = {401: "the key is missing or wrong", 403: "not allowed", 404: "no such model or path; check url and model"}
    return f"HTTP {error.code}" + (f", {hints[error.code]}" if error.code in hints else "")
