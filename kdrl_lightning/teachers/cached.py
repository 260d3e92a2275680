"""A teacher whose scores are kept on disk."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.losses.logprobs import Other, TokenScores
from kdrl_lightning.models.sharding import on_any_rank
from kdrl_lightning.rollout_batch import RolloutBatch, upload
from kdrl_lightning.teachers.base import Teacher
from kdrl_lightning.teachers.routed import scatter
from kdrl_lightning.teachers.wrapped import WrappedTeacher


class CachedTeacher(WrappedTeacher):
    """Looks up scores on disk; the wrapped teacher scores only completions that are not there.

    The key holds everything that a score depends on: the teacher's fingerprint, route and end
    token, precision, the student's prompt and the teacher's, completion, temperature and requested
    ids. The cache saves time if the same completions occur again: after a resume, with other
    hyper-parameters and the same seed, and on completions that the teacher generated.

    Args:
        teacher: the teacher that scores completions that are not in the file yet.
        path: SQLite file; created if it does not exist. Several processes may share it.

    Raises:
        ConfigurationError: ``path`` is a folder.
    """

    def __init__(self, teacher: Teacher, path: str) -> None:
        if Path(path).is_dir():
            raise ConfigurationError(
                f"`path` must be a file: got {path}, which is a folder. Name a file in it."
            )
        super().__init__(teacher)
        self.path = path
        self.hits = self.misses = 0
        self._database: sqlite3.Connection | None = None
        self._fingerprint = ""

    def load(self, device: torch.device) -> None:
        """Load the wrapped teacher and open the file.

        Raises:
            ConfigurationError: ``path`` is no writable SQLite file.
        """
        self.teacher.load(device)
        self._fingerprint = self.teacher.fingerprint()
        if self._database is None:
            self._database = _open(Path(self.path))

    def states(self, batch: RolloutBatch) -> Other:
        """Return the wrapped teacher's states; they are too large to cache."""
        return self.teacher.states(batch)

    def score(self, batch: RolloutBatch, topk_ids: Tensor | None = None) -> TokenScores:
        """Return scores from disk; the wrapped teacher scores missing rows, and we store these.

        See ``Teacher.score``.
        """
        if self._database is None:
            raise RuntimeError("the teacher is not loaded: call load() first")
        device = batch.input_ids.device
        keys = self._keys(batch, topk_ids)
        found = {key: self._read(key) for key in dict.fromkeys(keys)}
        new = [row for row, key in enumerate(keys) if found[key] is None]
        if self.collective and on_any_rank(bool(new), device) and not new:
            # This rank found all rows, but another rank's forward pass needs it in the collectives.
            self.teacher.take_part(batch)
        self.hits, self.misses = self.hits + len(keys) - len(new), self.misses + len(new)
        whole: TokenScores | None = None
        if new:
            rows = upload(torch.tensor(new), device)
            part = batch.select(new)
            asked = None if topk_ids is None else topk_ids[rows, : part.completion_ids.shape[1]]
            scores = self.teacher.score(part, asked)
            lengths, here = part.completion_lengths.tolist(), scores.map(Tensor.cpu)
            with self._database:
                for i, row in enumerate(new):
                    self._write(keys[row], here.map(lambda v, i=i: v[i, : lengths[i]]))  # type: ignore[misc]
            whole = scatter(whole, scores, rows, batch)
        for row, key in enumerate(keys):
            known = found[key]
            if known is not None:
                at = upload(torch.tensor([row]), device)
                there = known.map(lambda v: upload(v[None], device))
                whole = scatter(whole, there, at, batch)
        assert whole is not None, "a batch has rows"
        return whole

    def take_part(self, batch: RolloutBatch) -> None:
        """Join the collectives if another rank has rows that are not in the file."""
        if on_any_rank(False, batch.input_ids.device):
            self.teacher.take_part(batch)

    def _keys(self, batch: RolloutBatch, topk_ids: Tensor | None) -> list[str]:
        """Return the key of each row. Each table leaves a GPU once, not row by row."""
        device = batch.input_ids.device.type
        autocast = torch.is_autocast_enabled(device)
        computes = str(torch.get_autocast_dtype(device)) if autocast else None
        numbers = [batch.teacher_route, batch.prompt_lengths, batch.completion_lengths]
        ids, asked = batch.input_ids.tolist(), None if topk_ids is None else topk_ids.tolist()
        prompts, ends = (
            None if table is None else table.tolist()
            for table in (batch.teacher_prompt_ids, batch.teacher_ends)
        )
        keys = []
        for row, (route, prompt, tokens) in enumerate(torch.stack(numbers, 1).tolist()):
            content = [
                self._fingerprint,
                computes,
                route,
                batch.temperature,
                prompt,
                ids[row][: prompt + tokens],
                None if asked is None else asked[row][:tokens],
            ]
            if prompts is not None:
                content.append([i for i in prompts[row] if i >= 0])
            if ends is not None:
                content.append(ends[row])
            keys.append(hashlib.sha256(repr(content).encode()).hexdigest())
        return keys

    def _read(self, key: str) -> TokenScores | None:
        assert self._database is not None
        row = self._database.execute("SELECT scores FROM scores WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            fields = load(row[0])
        except SafetensorError:
            return None  # the caller scores a damaged entry, and writes it again
        return TokenScores(*(fields.get(n) for n in TokenScores._fields))  # type: ignore[arg-type]

    def _write(self, key: str, scores: TokenScores) -> None:
        assert self._database is not None
        fields = {n: v.contiguous() for n, v in scores._asdict().items() if v is not None}
        self._database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, save(fields)))


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # SQLite does not wait for others when it switches to WAL
            database = sqlite3.connect(path, timeout=60.0)
            database.execute("PRAGMA journal_mode = WAL")  # readers do not wait for a writer
            database.execute(
                "CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, scores BLOB)"
            )
            database.execute("SELECT key, scores FROM scores LIMIT 1")
            database.commit()
    except (OSError, sqlite3.Error) as error:
        raise ConfigurationError(
            f"`path` must be a SQLite file that can be written: got {path} ({error}). "
            "Name another file, or delete this one."
        ) from error
    return database
