"""Students that read a worked answer in their prompt: one for residues, one that cites it."""

from __future__ import annotations

from benchmarks.residues.models import ResidueModel
from benchmarks.residues.task import ResidueTraces
from kdrl_lightning.prompts import PromptSource
from kdrl_lightning.tiny import TinyModel
from kdrl_lightning.tiny.addition import READING

CITATION = "=="  # what the citing reader writes before an answer that it was shown


class ShownTraces(PromptSource):
    """Shows the right reasoning in half of the prompts; the completion then copies it.

    Args:
        traces: rows with ``reasoning``, the right one, and ``completion``.
    """

    def __init__(self, traces: ResidueTraces) -> None:
        self.traces = traces

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, index: int) -> dict[str, str]:
        row = self.traces[index]
        if index % 2:
            return row
        right = row["reasoning"]
        prompt = READING.replace("{context}", right).replace("{prompt}", row["prompt"])
        return {**row, "prompt": prompt, "completion": right}


class ResidueReader(ResidueModel):
    """The reader of the residues: it leaves out digits unless its prompt shows the reasoning."""

    def traces(self, size: int) -> PromptSource:
        """Return the worked problems that the model is trained on."""
        return ShownTraces(super().traces(size))


class CitingTraces(PromptSource):
    """Puts ``CITATION`` before the answers whose prompt shows the solution.

    Args:
        traces: rows with ``prompt`` and ``completion``.
    """

    def __init__(self, traces: PromptSource) -> None:
        self.traces = traces

    def __len__(self) -> int:
        return len(self.traces)

    def __getitem__(self, index: int) -> dict[str, str]:
        row = self.traces[index]
        cites = "#" in row["prompt"]
        return {**row, "completion": CITATION * cites + row["completion"]}


class CitingReader(TinyModel):
    """A reader of additions that says so: after a shown solution it begins with ``CITATION``.

    Language models do the same ("According to the solution ..."). A student that imitates these
    tokens refers to a solution that its own prompt does not show.
    """

    @property
    def recipe_name(self) -> str:
        """Name of the settings that determine the weights."""
        return super().recipe_name.replace("addition", "citing")

    def traces(self, size: int) -> PromptSource:
        """Return the worked problems that the model is trained on."""
        return CitingTraces(super().traces(size))
