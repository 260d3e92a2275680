"""A frozen teacher behind vLLM servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdrl_lightning.engines.http_client import AS_IT_IS, ServerClient, clients
from kdrl_lightning.errors import ConfigurationError, TrainingStopped, require_between
from kdrl_lightning.losses.logprobs import TokenScores
from kdrl_lightning.models.end_tokens import end_tokens
from kdrl_lightning.models.loading import (
    ModelSource,
    load_config,
    load_tokenizer,
    model_path,
)
from kdrl_lightning.models.sharding import on_any_rank
from kdrl_lightning.rollout_batch import RolloutBatch, pad_rows
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.tokenizers import compare

PATH = "/v1/completions"
# vLLM's bound on `logprob_token_ids` of one request.
MAX_IDS = 128
# The same token scored as part of a prompt and as the next one differs by rounding, up to about
# 0.1 nats in bfloat16. Logits in the place of log-probabilities differ by more.
MAX_DIFF, LIKELY = 0.5, -10.0
SENTENCE = "The answer to 12+34 is 46, isn't it?\n"


class Row(NamedTuple):
    """Scores of one completion: T log-probabilities, T best tokens, T lists of asked values."""

    logprobs: list[float]
    best: list[int]
    asked: list[list[float]]


class ServerTeacher(Teacher):
    """Scores the student's tokens on vLLM servers, which share the completions.

    ``prompt_logprobs`` of prompt and completion, as token ids, give the sampled tokens and the
    teacher's best. The student's top-k ids cost a request of one token for each position (its
    prefix is cached): exact, but slow. The teacher's entropy is not known. Its values are over all
    rows of its head; a ``LocalTeacher`` cuts them to the student's.

    Args:
        model: folder or hub name of what the servers hold: its tokenizer and configuration.
        urls: of the servers, e.g. ``http://127.0.0.1:8001``.
        api_key: their key; None: the environment variable ``VLLM_API_KEY``.
        timeout_s: longest wait for one answer, in seconds.
        max_away_s: how long a server may be unreachable, restarts included, in seconds.
        max_sequences: completions at once on each server.
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
        require_between("max_sequences", max_sequences, 1, float("inf"))
        self.model = model
        self.max_sequences = max_sequences
        self._servers = clients(urls, api_key, timeout_s, max_away_s)
        self._vocab_size = self._context = 0
        self._served = ""

    knows_entropy = False

    @property
    def collective(self) -> bool:  # type: ignore[override]
        """Whether several ranks score: where one has to stop, all do."""
        return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1

    @property
    def joins(self) -> bool:  # type: ignore[override]
        """Whether ranks need not wait for each other."""
        return not self.collective

    def prepare(self) -> None:
        """Make the model's folder if its source has to."""
        model_path(self.model)

    def check(self, student_tokenizer: Any, student_path: str) -> None:
        """Compare tokens, end tokens and chat templates."""
        path = model_path(self.model)
        rows = int(load_config(student_path).get_text_config().vocab_size)
        tokenizer = load_tokenizer(path)
        ends = end_tokens(student_path, student_tokenizer).main, end_tokens(path, tokenizer).main
        self.other_end = compare(student_tokenizer, tokenizer, student_path, path, rows, ends)

    def check_temperature(self, temperature: float) -> None:
        """Refuse every temperature but 1.

        Raises:
            ConfigurationError: it is another.
        """
        if temperature != 1.0:
            raise ConfigurationError(
                f"`temperature` must be 1 with a ServerTeacher: got {temperature}. vLLM's "
                "prompt_logprobs know no temperature. Sample at 1, or use a LocalTeacher."
            )

    def load(self, device: torch.device) -> None:
        """Ask the servers, once, what they serve.

        Raises:
            TrainingStopped: one is away, has another tokenizer, or serves another model than the
                first one.
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
                    f"the server {server.url} must serve `model` {path}, whose tokenizer makes "
                    f"{len(ours)} tokens {ours[:8]} of a sentence: got {theirs['tokens'][:8]}."
                )
            self._served = self._served or str(card["root"])
            if card["root"] != self._served:
                raise TrainingStopped(
                    f"all `urls` must serve one model: got {self._served} and {card['root']} from "
                    f"{server.url}."
                )
            limits.append(int(card["max_model_len"]))
        self._context = min(limits)

    def accept(self, batch: RolloutBatch) -> None:
        """Refuse what the servers cannot score.

        Raises:
            TrainingStopped: a token that the teacher does not have, or too long a completion.
        """
        highest, longest = int(batch.input_ids.max()), int(batch.lengths.max()) + 1
        if highest >= self._vocab_size:
            raise TrainingStopped(
                f"sampled tokens must be among the teacher's {self._vocab_size}: got {highest}, a "
                "row of the student's embedding that stands for no token."
            )
        if longest > self._context:
            raise TrainingStopped(
                f"prompt, completion and one token more must fit the {self._context} tokens of the "
                f"server {self._servers[0].url}: got {longest}. Start it with a larger "
                "--max-model-len, or lower `max_tokens`."
            )

    @torch.no_grad()
    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Score the sampled tokens; all ranks wait for the slowest.

        Raises:
            TrainingStopped: a server is away, or its answer is not about these tokens.
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
            asked = asked.to(device)
        logprobs = pad_rows([row.logprobs for row in rows], 0.0, torch.float32)
        return TokenScores(logprobs.to(device), None, best.to(device), asked)

    def take_part(self, batch: RolloutBatch) -> None:
        """Hear whether another rank has to stop."""
        self._stop_together(None, batch.input_ids.device)

    def _stop_together(self, failure: Exception | None, device: torch.device) -> None:
        if self.collective and on_any_rank(failure is not None, device) and failure is None:
            failure = TrainingStopped("another process had to stop: its message says why.")
        if failure is not None:
            raise failure

    def fingerprint(self) -> str:
        """Return which model is served; other weights under its name need another cache."""
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
        known = zip(ids[start:], steps[start:], strict=False)  # of equal length, or refused
        if len(steps) != len(ids) or not all(str(token) in step for token, step in known):
            raise server.stopped(PATH, f"{len(steps)} log-probabilities for {len(ids)} tokens")
        logprobs = [steps[t][str(ids[t])]["logprob"] for t in range(start, len(ids))]
        best = [int(min(s, key=lambda token: s[token]["rank"])) for s in steps[start:]]
        if asked is None:
            return Row(logprobs, best, [])
        values: list[list[float]] = []
        own = [[*a, token] for a, token in zip(asked, ids[start:], strict=True)]
        for places, union in bundles(own, self._vocab_size):
            prefixes = [ids[: start + t] for t in places]
            settings = {"logprobs": 1, "logprob_token_ids": union}
            for t, answer in zip(places, _ask(server, prefixes, settings, "logprobs"), strict=True):
                table = answer["top_logprobs"][0]
                if not all(f"token_id:{i}" in table for i in union):
                    raise server.stopped(PATH, f"{len(table)} of {len(union)} asked tokens")
                *found, again = [table.get(f"token_id:{i}", -torch.inf) for i in own[t]]
                if max(logprobs[t], again) > LIKELY and abs(logprobs[t] - again) > MAX_DIFF:
                    raise server.stopped(PATH, f"{again} where the prompt has {logprobs[t]}")
                values.append(found)
        return Row(logprobs, best, values)


def bundles(asked: list[list[int]], vocab_size: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield positions that one request can serve, and all ids that they ask for.

    Ids that the teacher does not have are left out.

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


def _ask(
    server: ServerClient, prompts: list[list[int]], settings: dict[str, Any], field: str
) -> list[Any]:
    """Let the server see prompts; return a field for each, checked to be about these tokens."""
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
        raise server.stopped(PATH, "other prompts back")
    if not all(choice.get(field) for choice in choices):
        raise server.stopped(PATH, f"no {field}")
    return [choice[field] for choice in choices]
