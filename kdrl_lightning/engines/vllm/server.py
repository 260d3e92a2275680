"""Sampling with vLLM servers, on other GPUs or other machines."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from kdrl_lightning.common.distributed import agree, agreed
from kdrl_lightning.common.untyped import Tree
from kdrl_lightning.engines.base import Completion, RolloutEngine, Sampling
from kdrl_lightning.engines.http_client import AS_IT_IS, AwayError, ServerClient, clients
from kdrl_lightning.engines.vllm.hub_names import HubWeights
from kdrl_lightning.engines.vllm.nccl_transport import TransferRoute
from kdrl_lightning.engines.vllm.options import BY_TRANSFORMERS, implementation_of
from kdrl_lightning.engines.vllm.requests import (
    check_requests,
    completion,
    context_of,
    limits,
    warn_of_one_rotary,
)
from kdrl_lightning.engines.weight_transport import FileRoute, WeightRoute, ranks
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_count
from kdrl_lightning.models.end_tokens import as_ids
from kdrl_lightning.models.weights import ModelWeights

# Concurrent requests to a server, by the student's device. On a GPU vLLM decodes up to 1024 rows;
# half of that stays below the usual limit of 1024 open files.
AT_ONCE = {"cuda": 512, "cpu": 128}


class VLLMServerEngine(RolloutEngine):
    """Divides the prompts among vLLM servers that ``python -m kdrl_lightning serve`` started.

    Weights reach the servers in one of two ways: the trainer writes files to ``weights_folder``,
    which each server loads, or vLLM's weight-transfer API copies them from GPU to GPU.

    The engine uses a server's answers only if the server held the current weights before and after
    sampling. If a server restarted in between, it loads the weights and samples again; the seeds
    are the same, and so are the completions.

    Args:
        urls: addresses of the servers, e.g. ``http://127.0.0.1:8000``.
        api_key: key of the servers; None: the environment variable ``VLLM_API_KEY``.
        weights_folder: a folder on a file system that trainer and servers share; None: a temporary
            folder of this machine.
        transfer: send weights by vLLM's weight-transfer API instead of files; None does so if the
            servers offer it (``serve --transfer nccl``) and the student is on a GPU.
        timeout_s: longest wait for one answer, in seconds.
        max_away_s: how long a server may be unreachable, restarts included, in seconds.
        max_sequences: concurrent requests to each server, each on its own connection; None: 512 if
            the student is on a GPU, else 128.
        max_model_len: longest prompt and completion together, in tokens; None: the servers' limit.

    Raises:
        ConfigurationError: there is no URL, or a number is out of range.
    """

    exact = False
    supports_async = True
    compared = True
    context: int

    def __init__(
        self,
        urls: Sequence[str],
        api_key: str | None = None,
        weights_folder: str | None = None,
        transfer: bool | None = None,
        timeout_s: float = 600.0,
        max_away_s: float = 120.0,
        max_sequences: int | None = None,
        max_model_len: int | None = None,
    ) -> None:
        if max_sequences is not None:
            require_count("max_sequences", max_sequences, 1, float("inf"))
        self.weights_folder = weights_folder
        self.transfer = transfer
        self.max_sequences = max_sequences
        self.max_model_len = max_model_len
        self._servers = clients(urls, api_key, timeout_s, max_away_s)
        self._route: WeightRoute | None = None
        self._backends: set[str] = set()
        self._label = ""
        self._at_once = max_sequences or AT_ONCE["cpu"]
        self._vocab_size = self.context = 0
        self._ends: tuple[int, ...] = ()

    def setup(
        self, weights: ModelWeights, eos_token_id: int | Sequence[int], pad_token_id: int
    ) -> None:
        """Check that every server serves this model; see ``RolloutEngine.setup``.

        Raises:
            ConfigurationError: ``weights_folder`` does not exist, or ``max_model_len`` is too long.
            TrainingStopped: a rank cannot reach a server, or a server serves another model.
        """
        agreed(lambda: self._check(weights, eos_token_id))
        if self.max_sequences is None:
            kind = next(weights.model.parameters()).device.type
            self._at_once = AT_ONCE.get(kind, AT_ONCE["cpu"])

    def _check(self, weights: ModelWeights, eos_token_id: int | Sequence[int]) -> None:
        if self.weights_folder is not None and not Path(self.weights_folder).is_dir():
            raise ConfigurationError(
                f"`weights_folder` must be a folder that trainer and servers share: got "
                f"{self.weights_folder}, which does not exist. Create it, or name another one."
            )
        config = weights.model.config.get_text_config()
        self._ends, self._vocab_size = as_ids(eos_token_id), int(config.vocab_size)
        wanted = {
            "architecture": type(weights.model).__name__,
            "vocab_size": str(config.vocab_size),
            "logprobs_mode": "processed_logprobs",
        }
        limits, self._route, self._backends = [], None, set()
        for server in self._servers:
            found = server.patiently(partial(server.rpc, "student"))[0]
            for name, value in wanted.items():
                if found[name] != value:
                    raise TrainingStopped(
                        f"the server {server.url} must serve the student, whose {name} is {value}: "
                        f"got {found[name]}. Start it with `python -m kdrl_lightning serve "
                        f"--model {weights.path}`."
                    )
            self._check_implementation(server, found, config.model_type)
            limits.append(int(found["max_model_len"]))
            self.dtype = getattr(torch, found["dtype"])
            self._backends.add(found["transfer"])
        warn_of_one_rotary(weights.model, max(limits))
        self.context = min(limits)
        if self.max_model_len is not None:
            self.context = min(self.context, context_of(config, self.max_model_len))

    def _check_implementation(
        self, server: ServerClient, found: dict[str, str], model_type: str
    ) -> None:
        by = found.get("implementation", "")
        if implementation_of(model_type) == "transformers" and not by.startswith("Transformers"):
            raise TrainingStopped(
                f"the server {server.url} must run {model_type} with transformers' code, or "
                f"updates of its {BY_TRANSFORMERS[model_type]} are lost: got "
                f"{by or 'an old server'}. Start it with `python -m kdrl_lightning serve`, which "
                "chooses that code."
            )

    def update_weights(self, weights: ModelWeights, version: int) -> None:
        """Send the weights to every server; all ranks must call it, but only the first one sends.

        Raises:
            TrainingStopped: the disk is full, or a server does not answer or refuses the weights.
        """
        label, failure = [f"{version}-{uuid.uuid4().hex}"], None
        if ranks()[1] > 1:
            torch.distributed.barrier()  # wait until no rank samples from the old weights
            torch.distributed.broadcast_object_list(label)
        self._label = label[0]
        route = agreed(lambda: self._route_of(weights))
        try:
            route.push(HubWeights(weights, self.dtype), self._servers, self._label)
        except Exception as error:  # if the first rank fails alone, `agree` stops the others
            failure = error
        agree(failure)
        self.version = version

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[list[int]], sampling: Sampling
    ) -> list[list[Completion]]:
        """Sample completions; see ``RolloutEngine.generate``.

        Raises:
            TrainingStopped: a prompt is empty, too long, or holds an unknown id, or a server fails
                or does not answer in time.
        """
        check_requests(prompts, sampling, self._vocab_size, self.context)
        if self.version is None:
            raise TrainingStopped(
                "the servers must have weights to sample from: got none. Call update_weights first."
            )
        requests = [(i, seed) for i, group in enumerate(seeds) for seed in group]
        first, count = ranks()[0], len(self._servers)
        # All requests of a group go to one server, whose prefix cache then has the prompt.
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
        return [[answers[i, seed] for seed in group] for i, group in enumerate(seeds)]

    def _batch(
        self,
        server: ServerClient,
        share: list[tuple[int, int]],
        bodies: dict[tuple[int, int], Tree],
    ) -> list[Completion]:
        self._load(server)
        with ThreadPoolExecutor(min(self._at_once, len(share))) as pool:
            made = list(pool.map(lambda r: self._ask(server, bodies[r]), share))
        if not self._holds(server):
            raise AwayError("it was restarted while it sampled, and has different weights")
        return made

    def _body(self, prompt: list[int], seed: int, sampling: Sampling) -> Tree:
        return {
            "prompt": prompt,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(self._ends),
            "ignore_eos": True,
            **AS_IT_IS,
            **limits(sampling),
        }

    def _ask(self, server: ServerClient, body: Tree) -> Completion:
        choice = server.post("/v1/completions", body)["choices"][0]
        if choice.get("prompt_token_ids") != body["prompt"]:
            raise server.stopped("/v1/completions", "an answer for another prompt")
        return completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], self._ends)

    def _load(self, server: ServerClient) -> None:
        """Send the current weights to a server that was restarted."""
        if not self._holds(server) and self._route is not None:
            self._route.again(server, self._label)

    def _route_of(self, weights: ModelWeights) -> WeightRoute:
        """Return the transport of weights, by files or by NCCL; the first call chooses it."""
        if self._route is None:
            on_gpu = next(weights.model.parameters()).device.type == "cuda"
            offered = len(self._backends) == 1 and "" not in self._backends
            if self.transfer and not offered:
                raise TrainingStopped(
                    f"`transfer` must be false for servers without one weight-transfer backend: "
                    f"got {sorted(self._backends)} from {self._servers[0].url} and others. Start "
                    "them with `python -m kdrl_lightning serve --transfer nccl`."
                )
            if offered and (on_gpu if self.transfer is None else self.transfer):
                self._route = TransferRoute(next(iter(self._backends)))
            else:
                self._route = FileRoute(self.weights_folder)
        return self._route

    def _holds(self, server: ServerClient) -> bool:
        """Return whether a server holds the current weights."""
        return bool(server.rpc("student")[0]["label"] == self._label)

    def _on_all(self, work: Callable[[ServerClient], None]) -> None:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            list(pool.map(work, self._servers))
