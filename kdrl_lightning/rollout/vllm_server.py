"""Sampling by vLLM servers: on other GPUs, or on other machines with a shared folder."""

from __future__ import annotations

import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between
from kdrl_lightning.rollout.engine import Completion, RolloutEngine, Sampling
from kdrl_lightning.rollout.requests import check_requests, completion, context_of
from kdrl_lightning.rollout.weight_files import write_shards
from kdrl_lightning.server_client import AS_IT_IS, AwayError, ServerClient, clients
from kdrl_lightning.weights import ModelWeights


class VLLMServerEngine(RolloutEngine):
    """Samples from servers that ``python -m kdrl_lightning serve`` starts, which share the prompts.

    Weights go through files: the trainer writes them to ``weights_folder``, each server loads them.
    Every answer is used only if its server held these weights before and after: a server that was
    restarted in between gets them again, and its completions are sampled again, the same ones.

    Args:
        urls: of the servers, e.g. ``http://127.0.0.1:8000``.
        api_key: their key; None: the environment variable ``VLLM_API_KEY``.
        weights_folder: on a file system that trainer and servers see; None: a temporary folder of
            this machine.
        timeout_s: longest wait for one answer, in seconds.
        max_away_s: how long a server may be unreachable, restarts included, in seconds.
        max_sequences: requests at once to each server.
        max_model_len: longest prompt and completion together, in tokens; None: the server's.
    """

    exact = False
    beside = True

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None = None,
        weights_folder: str | None = None,
        timeout_s: float = 600.0,
        max_away_s: float = 120.0,
        max_sequences: int = 128,
        max_model_len: int | None = None,
    ) -> None:
        require_between("max_sequences", max_sequences, 1, float("inf"))
        self.weights_folder = weights_folder
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self._servers = clients(urls, api_key, timeout_s, max_away_s)
        self._folder: Path | None = None
        self._label = ""
        self._vocab_size = self._context = self._eos = 0

    def setup(self, weights: ModelWeights, eos_token_id: int, pad_token_id: int) -> None:
        """Ask every server whether it serves this model.

        Raises:
            ConfigurationError: there is no ``weights_folder``.
            TrainingStopped: a server is away or serves another model.
        """
        if self.weights_folder is not None and not Path(self.weights_folder).is_dir():
            raise ConfigurationError(
                f"`weights_folder` must be a folder that trainer and servers see: got "
                f"{self.weights_folder}, which is none."
            )
        config = weights.model.config.get_text_config()
        self._eos, self._vocab_size = eos_token_id, int(config.vocab_size)
        wanted = {
            "architecture": type(weights.model).__name__,
            "vocab_size": str(config.vocab_size),
            "logprobs_mode": "processed_logprobs",
        }
        limits = []
        for server in self._servers:
            found = server.patiently(partial(server.rpc, "student"))[0]
            for name, value in wanted.items():
                if found[name] != value:
                    raise TrainingStopped(
                        f"the server {server.url} must serve the student, whose {name} is {value}: "
                        f"got {found[name]}. Start it with `python -m kdrl_lightning serve "
                        f"--model {weights.path}`."
                    )
            limits.append(int(found["max_model_len"]))
            self.dtype = getattr(torch, found["dtype"])
        self._context = min(limits)
        if self.max_model_len is not None:
            self._context = min(self._context, context_of(config, self.max_model_len))

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Write the weights, let every server load them; all ranks call it, the first one works.

        Raises:
            TrainingStopped: a server is away or does not take them.
        """
        rank, world = _ranks()
        if world > 1:
            torch.distributed.barrier()  # no rank is still sampling from the old ones
        label = [f"{version}-{uuid.uuid4().hex}"]
        folder, failure = [""], [""]
        if rank == 0:
            folder[0] = tempfile.mkdtemp(prefix="kdrl-weights-", dir=self.weights_folder)
        # All ranks: reading a sharded student is a collective.
        write_shards(weights.named_tensors(), Path(folder[0]) if rank == 0 else None)
        if world > 1:
            for shared in (label, folder):
                torch.distributed.broadcast_object_list(shared)
        old, self._folder, self._label = self._folder, Path(folder[0]), label[0]
        if rank == 0:
            try:
                self._on_all(self._load)
            except TrainingStopped as error:
                failure[0] = str(error)
            weakref.finalize(self, shutil.rmtree, folder[0], ignore_errors=True)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        if world > 1:
            torch.distributed.broadcast_object_list(failure)
        if failure[0]:
            raise TrainingStopped(failure[0])
        self.version = version

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Sample; see ``RolloutEngine.generate``.

        Raises:
            TrainingStopped: a prompt cannot be sampled from; a server is away too long, or fails.
        """
        check_requests(prompts, sampling, self._vocab_size, self._context)
        if self.version is None:
            raise TrainingStopped("the servers must have weights to sample from: update first.")
        requests = [(i, seed) for i, own in enumerate(seeds) for seed in own]
        first, count = _ranks()[0], len(self._servers)
        # A group stays on one server, which then has its prompt in the cache.
        shares = [
            [r for r in requests if (r[0] + first) % count == place] for place in range(count)
        ]
        bodies = {r: self._body(prompts[r[0]], r[1], sampling) for r in requests}
        answers: dict[tuple[int, int], Completion] = {}

        def work(server: ServerClient) -> None:
            share = shares[self._servers.index(server)]
            if share:
                made = server.patiently(lambda: self._batch(server, share, bodies))
                answers.update(zip(share, made, strict=True))

        self._on_all(work)
        return [[answers[i, seed] for seed in own] for i, own in enumerate(seeds)]

    def _batch(
        self,
        server: ServerClient,
        share: list[tuple[int, int]],
        bodies: dict[tuple[int, int], dict[str, Any]],
    ) -> list[Completion]:
        self._load(server, only_if_missing=True)
        with ThreadPoolExecutor(min(self.max_sequences, len(share))) as pool:
            made = list(pool.map(lambda r: self._ask(server, bodies[r]), share))
        if not self._holds(server):
            raise AwayError("it was restarted meanwhile, with other weights")
        return made

    def _body(self, prompt: list[int], seed: int, sampling: Sampling) -> dict[str, Any]:
        return {
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": [self._eos],
            "ignore_eos": True,
            **AS_IT_IS,
        }

    def _ask(self, server: ServerClient, body: dict[str, Any]) -> Completion:
        choice = server.post("/v1/completions", body)["choices"][0]
        if choice.get("prompt_token_ids") != body["prompt"]:
            raise server.stopped("/v1/completions", "another prompt back")
        return completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], self._eos)

    def _load(self, server: ServerClient, only_if_missing: bool = False) -> None:
        def load() -> None:
            if only_if_missing and self._holds(server):
                return
            server.post("/pause?mode=wait")
            try:
                answers = server.rpc("load_student", str(self._folder), self._label)
                if not server.post("/reset_prefix_cache")["success"]:
                    raise AwayError("its prefix cache is still in use")
            finally:
                server.post("/resume")
            for answer in answers:
                if "error" in answer:
                    raise server.stopped("load_student", answer["error"])

        server.patiently(load)

    def _holds(self, server: ServerClient) -> bool:
        """Whether a server has the weights that are to sample."""
        return bool(server.rpc("student")[0]["label"] == self._label)

    def _on_all(self, work: Callable[[ServerClient], None]) -> None:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(work, self._servers))


def _ranks() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()
