"""HTTP to one vLLM server: what can be tried again, and what cannot."""

from __future__ import annotations

import weakref
from typing import Any

import httpx

from kdrl_lightning.errors import TrainingStopped

# Overload, a proxy in between, a server that is starting or going down.
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})


class AwayError(Exception):
    """The server did not answer, or asks to come back later."""


class ServerClient:
    """Posts JSON to a server and names its URL in every error.

    Args:
        url: of the server, without a path.
        api_key: sent as a bearer token; None for none.
        timeout_s: longest wait for one answer, in seconds.
        connections: requests at once.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float, connections: int) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            trust_env=False,  # a proxy of the environment is not for a neighbour
        )
        weakref.finalize(self, self._http.close)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request; return the JSON of its answer, None where it is empty.

        Raises:
            AwayError: it may work later.
            TrainingStopped: it will not.
        """
        try:
            answer = self._http.post(path, json=body)
        except (httpx.TransportError, httpx.InvalidURL, OSError) as error:
            raise AwayError(f"{type(error).__name__}: {error}") from error
        if answer.status_code in TRANSIENT and not self._broken(path, answer.status_code):
            raise AwayError(f"status {answer.status_code}: {_says(answer)}")
        if answer.is_error:
            raise self.stopped(path, f"status {answer.status_code}: {_says(answer)}", answer)
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise self.stopped(path, f"no JSON: {_says(answer)}", answer) from error

    def rpc(self, method: str, *arguments: str) -> list[Any]:
        """Call a method of all of the server's workers.

        Returns:
            What each of them returned.

        Raises:
            AwayError: it may work later.
            TrainingStopped: it will not.
        """
        body = {"method": method, "args": list(arguments)}
        results: list[Any] = self.post("/collective_rpc", body)["results"]
        return results

    def _broken(self, path: str, status: int) -> bool:
        """Whether a healthy server fails to call a method: it does not have it."""
        if status != 500 or path != "/collective_rpc":
            return False
        try:
            return self._http.get("/health").is_success
        except (httpx.TransportError, OSError):
            return False

    def stopped(self, path: str, reason: str, answer: httpx.Response | None = None) -> Exception:
        """Return the error of a request that will not work, with its likely cure."""
        status = None if answer is None else answer.status_code
        cure = "Start it with `python -m kdrl_lightning serve`."
        if status in (401, 403):
            cure = "Give the server's key as `api_key` or in VLLM_API_KEY."
        elif status == 404 and path == "/collective_rpc":
            cure = f"It does not run in development mode. {cure}"
        return TrainingStopped(f"the server {self.url} must answer {path}: got {reason}. {cure}")


def _says(answer: httpx.Response) -> str:
    text = " ".join(answer.text.split())
    return text if len(text) <= 300 else f"{text[:300]}..."
