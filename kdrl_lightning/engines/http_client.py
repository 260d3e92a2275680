"""HTTP client for vLLM servers, which retries requests that may work later.

It uses Python's standard library, because all we need is that connections stay open.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TypeVar
from urllib.parse import urlsplit

from kdrl_lightning.common.untyped import Tree, Value
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between

# Answers of an overloaded server, of a proxy, or of a server that starts or stops.
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
KEPT_S = 2.0  # vLLM closes idle connections after 5 s
# Sample from the model's unchanged distribution, whatever its files or the server's flags say.
AS_IT_IS = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}

T = TypeVar("T")
Pool = queue.LifoQueue[tuple[HTTPConnection, float]]


class AwayError(Exception):
    """Raised if a server does not answer, or asks to retry later."""


@dataclass(frozen=True)
class Answer:
    """Status and text of an HTTP answer."""

    status: int
    text: str

    def __str__(self) -> str:
        text = " ".join(self.text.split())
        return f"status {self.status}: {text if len(text) <= 300 else f'{text[:300]}...'}"


class ServerClient:
    """Exchanges JSON with a server, from any number of threads; every error names the URL.

    Args:
        url: address of the server; a path in it is put before the path of every request.
        api_key: key to send as a bearer token; None sends none.
        timeout_s: longest wait for any part of an answer, in seconds.
        max_away_s: how long the server may be unreachable, in seconds.

    Raises:
        ConfigurationError: ``url`` is no URL.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float, max_away_s: float) -> None:
        self.url, self.max_away_s = url.rstrip("/"), max_away_s
        parts = urlsplit(self.url)
        try:
            self._address = (parts.hostname or "", parts.port)
        except ValueError as error:
            raise ConfigurationError(
                f"`urls` must be http addresses: got {url}. For example http://127.0.0.1:8000."
            ) from error
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._path, self._timeout = parts.path, timeout_s
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._kept: Pool = queue.LifoQueue()
        weakref.finalize(self, _close, self._kept)

    def post(self, path: str, body: Tree | None = None) -> Value:
        """Post JSON and return the JSON of the answer; None if the answer is empty.

        Args:
            path: path on the server.
            body: the JSON to send; None sends an empty object.

        Raises:
            AwayError: the request may work later.
            TrainingStopped: the server refuses the request.
        """
        return self._answer("POST", path, json.dumps(body or {}))

    def get(self, path: str) -> Value:
        """Get a path and return the JSON of the answer; raises the same errors as ``post``."""
        return self._answer("GET", path)

    def patiently(self, work: Callable[[], T]) -> T:
        """Return the result of ``work``; retry it after ``AwayError``, with growing pauses.

        Raises:
            TrainingStopped: ``work`` still fails after ``max_away_s``.
        """
        deadline = time.monotonic() + self.max_away_s
        for pause in itertools.chain([0.5, 1.0, 2.0, 4.0], itertools.repeat(5.0)):
            try:
                return work()
            except AwayError as error:
                if time.monotonic() + pause > deadline:
                    raise TrainingStopped(
                        f"the server {self.url} must answer within `max_away_s` "
                        f"{self.max_away_s:g} seconds: got {error}. Check that it runs; start it "
                        "with `python -m kdrl_lightning serve`."
                    ) from error
            time.sleep(pause)
        raise AssertionError("the pauses have no end")

    def _answer(self, method: str, path: str, body: str | None = None) -> Value:
        answer = self._send(method, path, body)
        if answer.status in TRANSIENT and not self._broken(path, answer.status):
            raise AwayError(str(answer))
        if answer.status >= 300:
            raise self.stopped(path, str(answer), answer.status)
        try:
            return json.loads(answer.text) if answer.text else None
        except ValueError as error:
            raise self.stopped(path, f"no JSON: {answer}") from error

    def rpc(self, method: str, *arguments: str) -> list[Value]:
        """Call a method on every worker of the server and return each worker's result.

        Args:
            method: name of the method.
            *arguments: the method's arguments.

        Raises:
            AwayError: the call may work later.
            TrainingStopped: the server refuses the call.
        """
        body = {"method": method, "args": list(arguments)}
        results: list[Value] = self.post("/collective_rpc", body)["results"]
        return results

    def stopped(self, path: str, reason: str, status: int | None = None) -> Exception:
        """Return the error for a request that the server refuses, with the likely cure.

        Args:
            path: path or method of the request.
            reason: what came back instead of an answer.
            status: HTTP status of the answer; None if it is not the cause.
        """
        cure = "Start it with `python -m kdrl_lightning serve`."
        if status in (401, 403):
            cure = "Give the server's key as `api_key` or in VLLM_API_KEY."
        elif status == 404 and path == "/collective_rpc":
            cure = f"The server does not run in development mode. {cure}"
        return TrainingStopped(f"the server {self.url} must answer {path}: got {reason}. {cure}")

    def _send(self, method: str, path: str, body: str | None = None) -> Answer:
        connection = self._connection()
        try:
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            answer = Answer(response.status, response.read().decode(errors="replace"))
        except (OSError, HTTPException) as error:
            connection.close()
            raise AwayError(f"{type(error).__name__}: {error}") from error
        self._kept.put((connection, time.monotonic()))
        return answer

    def _connection(self) -> HTTPConnection:
        while True:
            try:
                connection, used = self._kept.get_nowait()
            except queue.Empty:
                return self._kind(*self._address, timeout=self._timeout)
            if time.monotonic() - used < KEPT_S:
                return connection
            connection.close()

    def _broken(self, path: str, status: int) -> bool:
        """Return whether a healthy server fails to call a method, because it lacks the method."""
        if status != 500 or path != "/collective_rpc":
            return False
        try:
            return self._send("GET", "/health").status == 200
        except AwayError:
            return False


def clients(
    urls: Sequence[str], api_key: str | None, timeout_s: float, max_away_s: float
) -> list[ServerClient]:
    """Return a client for each server.

    Args:
        urls: addresses of the servers, at least one.
        api_key: key of the servers; None: the environment variable ``VLLM_API_KEY``.
        timeout_s: longest wait for any part of an answer, in seconds.
        max_away_s: how long a server may be unreachable, in seconds.

    Raises:
        ConfigurationError: there is no URL, an entry is no URL, or a time is negative.
    """
    if isinstance(urls, str) or not urls or not all(u.startswith("http") for u in urls):
        raise ConfigurationError(
            f"`urls` must be a list of at least one http address: got {urls}. For example "
            "[http://127.0.0.1:8000]."
        )
    for name, value in {"timeout_s": timeout_s, "max_away_s": max_away_s}.items():
        require_between(name, value, 0.0, float("inf"))
    key = api_key or os.environ.get("VLLM_API_KEY")
    return [ServerClient(url, key, timeout_s, max_away_s) for url in urls]


def _close(pool: Pool) -> None:
    while not pool.empty():
        pool.get_nowait()[0].close()
