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
from kdrl_lightning.rollout_batch import RolloutBatch
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
        keys = [self._key(batch, row, topk_ids) for row in range(len(batch))]
        found = {k: self._read(k, batch.input_ids.device) for k in dict.fromkeys(keys)}
        new = [row for row, key in enumerate(keys) if found[key] is None]
        if self.collective and on_any_rank(bool(new), batch.input_ids.device) and not new:
            # This rank found all rows, but another rank's forward pass needs it in the collectives.
            self.teacher.take_part(batch)
        self.hits, self.misses = self.hits + len(keys) - len(new), self.misses + len(new)
        whole: TokenScores | None = None
        if new:
            rows = torch.tensor(new, device=batch.input_ids.device)
            part = batch.select(rows)
            asked = None if topk_ids is None else topk_ids[rows, : part.completion_ids.shape[1]]
            scores = self.teacher.score(part, asked)
            lengths = part.completion_lengths.tolist()
            with self._database:
                for i, row in enumerate(new):
                    self._write(keys[row], scores.map(lambda v, i=i: v[i, : lengths[i]]))  # type: ignore[misc]
            whole = scatter(whole, scores, rows, batch)
        for row, key in enumerate(keys):
            known = found[key]
            if known is not None:
                at = torch.tensor([row], device=batch.input_ids.device)
                whole = scatter(whole, known.map(lambda v: v[None]), at, batch)
        assert whole is not None, "a batch has rows"
        return whole

    def take_part(self, batch: RolloutBatch) -> None:
        """Join the collectives if another rank has rows that are not in the file."""
        if on_any_rank(False, batch.input_ids.device):
            self.teacher.take_part(batch)

    def _key(self, batch: RolloutBatch, row: int, topk_ids: Tensor | None) -> str:
        tokens, device = int(batch.completion_lengths[row]), batch.input_ids.device.type
        autocast = torch.is_autocast_enabled(device)
        content = [
            self._fingerprint,
            str(torch.get_autocast_dtype(device)) if autocast else None,
            int(batch.teacher_route[row]),
            batch.temperature,
            int(batch.prompt_lengths[row]),
            batch.input_ids[row, : int(batch.lengths[row])].tolist(),
            None if topk_ids is None else topk_ids[row, :tokens].tolist(),
        ]
        if batch.teacher_prompt_ids is not None:
            content.append([i for i in batch.teacher_prompt_ids[row].tolist() if i >= 0])
        if batch.teacher_ends is not None:
            content.append(int(batch.teacher_ends[row]))
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def _read(self, key: str, device: torch.device) -> TokenScores | None:
        assert self._database is not None
        row = self._database.execute("SELECT scores FROM scores WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            fields = load(row[0])
        except SafetensorError:
            return None  # the caller scores a damaged entry, and writes it again
        return TokenScores(*(fields.get(n) for n in TokenScores._fields)).map(  # type: ignore[arg-type]
            lambda v: v.to(device)
        )

    def _write(self, key: str, scores: TokenScores) -> None:
        assert self._database is not None
        fields = {n: v.cpu().contiguous() for n, v in scores._asdict().items() if v is not None}
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
