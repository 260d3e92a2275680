"""Kills other processes of a run: reward workers, and the server that samples."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fault_cases.runs import PATIENCE, ROOT, Run, command

Event = dict[str, Any]
AWAY_S = 5.0
# The scripted server of the tests: it takes weights, and answers like a server that samples.
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from helpers.with_vllm.scripted import Scripted

def complete(body):
    ids = [5] * (1 + body["seed"] % 3) + [1]
    logprobs = {"token_logprobs": [-0.5] * len(ids)}
    return {"choices": [{"prompt_token_ids": body["prompt"], "token_ids": ids,
                         "logprobs": logprobs}]}

made = Scripted("Qwen2ForCausalLM", int(sys.argv[2]), int(sys.argv[3]))
made.routes["/v1/completions"] = complete
print("ready", flush=True)
time.sleep(1e6)
"""


class Server:
    """Runs a scripted server in a separate process, on one port of loopback.

    Args:
        student: folder of the model that it pretends to serve.
    """

    def __init__(self, student: str) -> None:
        self.vocab = int(json.loads((Path(student) / "config.json").read_text())["vocab_size"])
        self.port = free_port()
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self.port}"

    def flags(self, max_away_s: float = 120.0) -> tuple[str, ...]:
        """Return the flags of a run that samples from it."""
        settings = {"urls": [self.url], "max_away_s": max_away_s, "timeout_s": 20.0}
        engine = {"class_path": "VLLMServerEngine", "init_args": settings}
        # Its log-probabilities are not the model's.
        return (f"--data.rollout_engine={json.dumps(engine)}", "--weight_sync.max_mean_diff=1000")

    def start(self) -> None:
        """Start it, and wait until it listens."""
        arguments = [str(ROOT / "tests"), str(self.vocab), str(self.port)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("the scripted server did not start")

    def kill(self) -> None:
        """Kill the server without notice."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """Return a free port of loopback."""
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def reward(folder: Path, plain: Any, strategy: str, seed: str) -> Iterator[Event]:
    """Kill processes of the reward five times in a run, and check that no verdict changes."""
    from fault_cases.kills import finished

    init = {"function": "helpers.odd_length", "time_limit_s": 60.0, "workers": 2}
    spec = json.dumps({"class_path": "RewardFunction", "init_args": init})
    draw = random.Random(seed)
    run = Run(folder, strategy, plain.models, (f"--data.reward={spec}",))
    run.start()
    assert run.process is not None
    first, kills = run.process.pid, 0
    while kills < 5 and run.until(lambda: workers_of(first)):
        found = workers_of(first)
        if run.process.poll() is not None:
            break
        if run.steps() and found:
            os.kill(draw.choice(found), signal.SIGKILL)
            kills += 1
            time.sleep(draw.uniform(0.0, 0.3))
    event = finished(run, plain.run(strategy), "reward")
    if not event["fault"] and kills == 0:
        event["fault"] = "no process was killed"
    yield {**event, "what": f"{kills} processes of the reward killed", "times": kills}


def workers_of(session: int) -> list[int]:
    """Return the reward processes that a run has started."""
    everyone = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    judges = [p for p in everyone if b"kdrl_lightning.rewards.processes.worker" in command(p)]
    return sorted(p for p in judges if session in ancestors(p))


def ancestors(process: int) -> list[int]:
    """Return the parents of a process, up to the first."""
    out: list[int] = []
    try:
        while process > 1:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            process = int(fields[1])
            out.append(process)
    except OSError:  # it has ended meanwhile
        return []
    return out


def server(folder: Path, plain: Any, strategy: str, seed: str) -> Iterator[Event]:
    """Kill the server, for good or for a moment; expect an error with its URL, or the same end."""
    from fault_cases.disks import stopped
    from fault_cases.kills import finished

    with Server(plain.models[0]) as made:
        undisturbed = plain.run(strategy, *made.flags())
        run = Run(folder, strategy, plain.models, made.flags(AWAY_S))
        run.start()
        run.until(lambda: len(run.steps()) > 2)
        made.kill()
        begun = time.monotonic()
        event = stopped(run, "server", "killed for good", made.url)
        event["seconds_to_end"] = round(time.monotonic() - begun, 1)
        if event["seconds_to_end"] > AWAY_S + PATIENCE / 10:
            event["fault"] = event["fault"] or "it took too long to stop"
        made.start()
        run.flags = made.flags()
        run.start()  # and once more, for a moment
        run.until(lambda: len(run.steps()) > 2)
        made.kill()
        made.start()
        end = finished(run, undisturbed, "server")
        yield event
        yield {**end, "what": "killed for a moment", "times": 1}
