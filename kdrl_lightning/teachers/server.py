"""A frozen teacher on vLLM servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_lightning.common.untyped import HFTokenizer, Tree
from kdrl_lightning.engines.http_client import AS_IT_IS, ServerClient, clients
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_count
from kdrl_lightning.losses.logprobs import TokenScores
from kdrl_lightning.models.end_tokens import end_tokens
from kdrl_lightning.models.loading import (
    ModelSource,
    load_config,
    load_tokenizer,
    model_path,
)
from kdrl_lightning.models.sharding import on_any_rank
from kdrl_lightning.rollout_batch import RolloutBatch, pad_rows, upload
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.tokenizers import compare

# `Any`: transformers has no type that all tokenizers share; requests are JSON.

PATH = "/v1/completions"
# vLLM's bound on `logprob_token_ids` of one request.
MAX_IDS = 128
# vLLM scores a token as part of a prompt and as the next token with different rounding, up to about
# 0.1 nats in bfloat16. A server that returns logits instead of log-probabilities is off by more.
MAX_DIFF, LIKELY = 0.5, -10.0
SENTENCE = "The answer to 12+34 is 46, isn't it?\n"


class Row(NamedTuple):
    """Scores of one completion of T tokens.

    Attributes:
        logprobs: T log-probabilities of the sampled tokens, in nats.
        best: the teacher's most likely token at each of the T positions.
        asked: T lists with the log-probabilities of the requested ids; empty if there are none.
    """

    logprobs: list[float]
    best: list[int]
    asked: list[list[float]]


class ServerTeacher(Teacher):
    """Scores completions on vLLM servers, and divides the completions among them.

    Start one with ``python -m kdrl_lightning serve --teacher``; any ``vllm serve`` works, too. One
    request with ``prompt_logprobs`` gives the log-probabilities of a completion and the teacher's
    most likely tokens. Scores of the student's top-k ids need one more prompt for each position
    (its prefix is cached): they are exact, but slow. Servers do not return the teacher's entropy.
    Log-probabilities are normalised over all rows of the teacher's head; a ``LocalTeacher`` uses
    the student's rows only.

    Args:
        model: folder or hub name of the served model; tokenizer and configuration are read from it.
        urls: addresses of the servers, e.g. ``http://127.0.0.1:8001``.
        api_key: key of the servers; None: the environment variable ``VLLM_API_KEY``.
        timeout_s: longest wait for one answer, in seconds.
        max_away_s: how long a server may be unreachable, restarts included, in seconds.
        max_sequences: completions scored at once on each server.
    """

    def __init__(
        self,
        model: str | ModelSource,
        urls: Sequence[str],
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_away_s: float = 120.0,
        max_sequences: int = 32,
    ) -> None:
        require_count("max_sequences", max_sequences, 1, float("inf"))
        self.model = model
        self.max_sequences = max_sequences
        self._servers = clients(urls, api_key, timeout_s, max_away_s)
        self._vocab_size = self._context = 0
        self._served = ""

    knows_entropy = False

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether there are several ranks: if one has to stop, all stop."""
        return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether there is a single rank, which need not wait for others."""
        return not self.collective

    @property
    def context_length(self) -> int | None:
        """Maximum length of prompt plus completion on all servers; None before ``load``."""
        return self._context - 1 if self._context else None

    @property
    def tokenizer_path(self) -> str:
        """Folder or hub name of the served model."""
        return model_path(self.model)

    def prepare(self) -> None:
        """Make the model's folder if its source needs to."""
        model_path(self.model)

    def check(self, student_tokenizer: HFTokenizer, student_path: str) -> None:
        """Compare tokens, end tokens and chat templates with the student's.

        Raises:
            ConfigurationError: vocabularies differ, or the student has no row for the teacher's end
                token.
        """
        path = model_path(self.model)
        rows = int(load_config(student_path).get_text_config().vocab_size)
        tokenizer = load_tokenizer(path)
        ends = end_tokens(student_path, student_tokenizer).main, end_tokens(path, tokenizer).main
        self.other_end = compare(student_tokenizer, tokenizer, student_path, path, rows, ends)

    def check_temperature(self, temperature: float) -> None:
        """Refuse every temperature but 1.

        Raises:
            ConfigurationError: the temperature is not 1.
        """
        if temperature != 1.0:
            raise ConfigurationError(
                f"`temperature` must be 1 with a ServerTeacher: got {temperature}. vLLM ignores "
                "temperatures in prompt_logprobs. Sample at 1, or use a LocalTeacher."
            )

    def load(self, device: torch.device) -> None:
        """Check which model the servers serve; a second call does nothing.

        Raises:
            TrainingStopped: a server does not answer, has another tokenizer, or serves another
                model than the first server.
        """
        if self._context:
            return
        path = model_path(self.model)
        self._vocab_size = int(load_config(path).get_text_config().vocab_size)
        ours = load_tokenizer(path)(SENTENCE)["input_ids"]
        limits = []
        for server in self._servers:
            card = server.patiently(partial(server.get, "/v1/models"))["data"][0]
            theirs = server.patiently(partial(server.post, "/tokenize", {"prompt": SENTENCE}))
            if theirs["tokens"] != ours:
                raise TrainingStopped(
                    f"the server {server.url} must have the tokenizer of `model` {path}, which "
                    f"splits a test sentence into {len(ours)} tokens, first {ours[:8]}: got "
                    f"{theirs['tokens'][:8]}. Correct `model`, or serve that model."
                )
            self._served = self._served or str(card["root"])
            if card["root"] != self._served:
                raise TrainingStopped(
                    f"all `urls` must serve the same model: got {self._served}, and {card['root']} "
                    f"from {server.url}. Restart that server, or remove it from `urls`."
                )
            limits.append(int(card["max_model_len"]))
        self._context = min(limits)

    def accept(self, batch: RolloutBatch) -> None:
        """Refuse completions that the servers cannot score.

        Raises:
            TrainingStopped: the teacher has no row for a token, or a completion is too long.
        """
        highest, longest = int(batch.input_ids.max()), int(batch.lengths.max()) + 1
        if highest >= self._vocab_size:
            raise TrainingStopped(
                f"sampled token ids must be below {self._vocab_size}, the rows of the teacher's "
                f"head: got {highest}, a padding row of the student's embedding. Train the student "
                "to avoid padding rows first."
            )
        if longest > self._context:
            raise TrainingStopped(
                f"prompt and completion plus one token must fit into the context of "
                f"{self._context} tokens of the server {self._servers[0].url}: got {longest}. "
                "Start it with a larger --max-model-len, or lower `max_tokens`."
            )

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens; all ranks wait for the slowest. See ``Teacher.score``.

        Raises:
            TrainingStopped: a server does not answer, or its answer is not for these tokens.
        """
        rows: list[Row] = []
        failure: Exception | None = None
        try:
            rows = self._rows(batch, topk_ids)
        except Exception as error:
            failure = error
        device = batch.input_ids.device
        self._stop_together(failure, device)
        best = pad_rows([row.best for row in rows], 0, torch.long)[..., None]
        asked = None
        if topk_ids is not None:
            asked = torch.zeros(topk_ids.shape)
            for i, row in enumerate(rows):
                asked[i, : len(row.asked)] = torch.tensor(row.asked)
            asked = upload(asked, device)
        logprobs = pad_rows([row.logprobs for row in rows], 0.0, torch.float32)
        return TokenScores(upload(logprobs, device), None, upload(best, device), asked)

    def take_part(self, batch: RolloutBatch) -> None:
        """Raise if another rank has to stop."""
        self._stop_together(None, batch.input_ids.device)

    def _stop_together(self, failure: Exception | None, device: torch.device) -> None:
        if self.collective and on_any_rank(failure is not None, device) and failure is None:
            failure = TrainingStopped("another process had to stop: its message says why.")
        if failure is not None:
            raise failure

    def fingerprint(self) -> str:
        """Return the name of the served model and its configuration.

        It does not change with the weights: use a new cache file for other weights of that name.
        """
        return f"server {self._served} {load_config(model_path(self.model)).to_json_string()}"

    def _rows(self, batch: RolloutBatch, topk_ids: Tensor | None) -> list[Row]:
        self.check_temperature(batch.temperature)
        self.accept(batch)
        ids = [r[:n] for r, n in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)]
        starts = batch.prompt_lengths.tolist()
        wanted = None if topk_ids is None else topk_ids.tolist()

        def row(i: int) -> Row:
            server = self._servers[i % len(self._servers)]
            asked = None if wanted is None else wanted[i][: len(ids[i]) - starts[i]]
            return server.patiently(lambda: self._row(server, ids[i], starts[i], asked))

        with ThreadPoolExecutor(self.max_sequences * len(self._servers)) as pool:
            return list(pool.map(row, range(len(ids))))

    def _row(
        self, server: ServerClient, ids: list[int], start: int, asked: list[list[int]] | None
    ) -> Row:
        (steps,) = _ask(server, [ids], {"prompt_logprobs": 1}, "prompt_logprobs")
        known = zip(ids[start:], steps[start:], strict=False)  # unequal lengths are refused below
        if len(steps) != len(ids) or not all(str(token) in step for token, step in known):
            raise server.stopped(PATH, f"{len(steps)} log-probabilities for {len(ids)} tokens")
        logprobs = [steps[t][str(ids[t])]["logprob"] for t in range(start, len(ids))]
        best = [int(min(s, key=lambda token: s[token]["rank"])) for s in steps[start:]]
        if asked is None:
            return Row(logprobs, best, [])
        values: list[list[float]] = []
        wanted = [[*a, token] for a, token in zip(asked, ids[start:], strict=True)]
        for places, union in bundles(wanted, self._vocab_size):
            prefixes = [ids[: start + t] for t in places]
            settings = {"logprobs": 1, "logprob_token_ids": union}
            for t, answer in zip(places, _ask(server, prefixes, settings, "logprobs"), strict=True):
                table = answer["top_logprobs"][0]
                if not all(f"token_id:{i}" in table for i in union):
                    raise server.stopped(PATH, f"{len(table)} of {len(union)} requested tokens")
                *found, again = [table.get(f"token_id:{i}", -torch.inf) for i in wanted[t]]
                if max(logprobs[t], again) > LIKELY and abs(logprobs[t] - again) > MAX_DIFF:
                    raise server.stopped(PATH, f"{again} for a token scored {logprobs[t]} before")
                values.append(found)
        return Row(logprobs, best, values)


def bundles(asked: list[list[int]], vocab_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield positions that one request can score, with all ids that are requested at any of them.

    Args:
        asked: requested ids of each position.
        vocab_size: rows of the teacher's embedding; higher ids are left out.

    >>> list(bundles([[1, 2], [2, 9], [3, 1]], 5))
    [([0, 1, 2], [1, 2, 3])]
    """
    places: list[int] = []
    union: set[int] = set()
    for place, ids in enumerate(asked):
        new = union.union(i for i in ids if i < vocab_size)
        if len(new) > MAX_IDS and places:
            yield places, sorted(union)
            places, new = [], {i for i in ids if i < vocab_size}
        places.append(place)
        union = new
    if places:
        yield places, sorted(union)


def _ask(server: ServerClient, prompts: list[list[int]], settings: Tree, field: str) -> list[Any]:
    """Send prompts and return one field of each answer, checked to be for these tokens."""
    body = {
        "prompt": prompts,
        "max_tokens": 1,
        "temperature": 1.0,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        **AS_IT_IS,
        **settings,
    }
    choices = sorted(server.post(PATH, body)["choices"], key=lambda choice: choice["index"])
    if [choice.get("prompt_token_ids") for choice in choices] != prompts:
        raise server.stopped(PATH, "an answer for other prompts")
    if not all(choice.get(field) for choice in choices):
        raise server.stopped(PATH, f"no {field}")
    return [choice[field] for choice in choices]
