"""A server with scripted answers, for faults that a real one does not have."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

EOS = 1


class Scripted:
    """Answers like a server with ``vocab`` tokens; each entry of ``faults`` replaces one answer."""

    def __init__(self, architecture: str, vocab: int, port: int = 0) -> None:
        self.faults: list[tuple[int, str]] = []
        self.routes: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/collective_rpc": self.rpc,
            "/v1/completions": self.complete,
            "/pause": lambda body: {},
            "/resume": lambda body: {},
            "/reset_prefix_cache": lambda body: {"success": True},
        }
        self.describe = {
            "architecture": architecture,
            "vocab_size": str(vocab),
            "max_model_len": "64",
            "dtype": "float32",
            "transfer": "",
            "logprobs_mode": "processed_logprobs",
        }
        self.label, self.asked, self.loads = "", 0, 0
        self.wait_s = 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                route = outer.routes.get(self.path, lambda body: {})
                self.reply(200, route({}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
                route = outer.routes.get(self.path.split("?")[0])
                if route is None:
                    return self.reply(404, {"detail": "Not Found"})
                if self.path == "/v1/completions":
                    outer.asked += 1
                    time.sleep(outer.wait_s)
                    if outer.faults:
                        status, text = outer.faults.pop(0)
                        return self.reply(status, {"error": text})
                self.reply(200, route(body))

            def reply(self, status: int, answer: Any) -> None:
                raw = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *args: Any) -> None:
                """Keep quiet."""

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def rpc(self, body: dict[str, Any]) -> Any:
        if body["method"] == "load_student":
            self.loads += 1
            assert load_file(Path(body["args"][0]) / "00000.safetensors")
            self.label = body["args"][1]
            return {"results": [{"label": self.label}]}
        return {"results": [{"label": self.label, **self.describe}]}

    def complete(self, body: dict[str, Any]) -> Any:
        choice = {
            "prompt_token_ids": body["prompt"],
            "token_ids": [5, EOS],
            "logprobs": {"token_logprobs": [-0.5, -body["seed"] - 1.0]},
        }
        return {"choices": [choice]}
