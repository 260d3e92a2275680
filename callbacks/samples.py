"""Shows a few completions, on a page in the run folder and in loggers that take text."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kdrl_lightning.callbacks.base import (
    RolloutCallback,
    StepOutputs,
    starts_step,
    updates_per_rollout,
)
from kdrl_lightning.callbacks.reports import (
    SampleView,
    Section,
    choose,
    cut_tokens,
    log_samples,
    render,
    scored_views,
    text_view,
)
from kdrl_lightning.errors import require_count
from kdrl_lightning.evaluation.batch import EvaluationBatch
from kdrl_lightning.rollout_batch import RolloutBatch
from kdrl_lightning.trainer.end_of_run import write_or_warn
from kdrl_lightning.trainer.protocols import TrainedModule, is_trial_run, rollout_data, trained
from kdrl_lightning.trainer.run_folder import run_folder

SCORED = (
    "Completions of the last rollout, with the log-probabilities of the last update that used them."
)
UNSCORED = (
    "Completions of the validation: the teacher has not scored them, so only the text is shown."
)


class SamplePage(RolloutCallback):
    """Shows a few completions at each validation and at the end of training.

    ``samples.html`` in the run folder colours each token of the last rollout by the teacher's gap,
    and marks how the update used it. For validation completions it shows only the text. A
    TensorBoard or W&B logger gets the text of both. All completions come from the first rank. A
    resumed run starts a new page.

    ``docs/evaluation.md`` explains the page.

    Args:
        completions: number to show of the rollout and of each validation set; 0 writes no page.
        moments: number of newest validations that the page keeps.
        max_tokens: maximum number of tokens to show of a completion.
    """

    def __init__(self, completions: int = 4, moments: int = 10, max_tokens: int = 512) -> None:
        require_count("completions", completions, 0, float("inf"))
        require_count("moments", moments, 1, float("inf"))
        require_count("max_tokens", max_tokens, 1, float("inf"))
        self.completions = completions
        self.moments = moments
        self.max_tokens = max_tokens
        self.sections: list[Section] = []
        self._step: list[tuple[RolloutBatch, Tensor]] = []
        self._validated: dict[str, list[SampleView]] = {}
        self._shown = -1

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget an earlier run."""
        if stage == "fit":
            self.sections, self._step, self._validated, self._shown = [], [], {}, -1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: StepOutputs,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Keep the micro-batches of the latest optimizer step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not trainer.is_global_zero or batch.rollout_logprobs is None:
            return
        if starts_step(trainer, batch_idx):
            self._step = []
        self._step.append(
            (trained(pl_module).completed(batch).replace(metrics={}), outputs["logprobs"])
        )

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: EvaluationBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first completions of each validation set."""
        views = self._validated.setdefault(batch.of.name, [])
        for i in range(min(self.completions - len(views), len(batch.judged))):
            row, sample = batch.rows[i // batch.of.samples], i % batch.of.samples
            title = f"prompt {row}, sample {sample}"
            views.append(text_view(batch.judged[i], title, trained(pl_module).tokenizer))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the page."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._show(trainer, trained(pl_module))
        self._validated = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the page again, unless the last validation just did."""
        if self._shown != trainer.global_step:
            self._show(trainer, trained(pl_module))
        self._step = []

    def section(self, trainer: pl.Trainer, pl_module: TrainedModule) -> Section:
        """Return the section of the page for this step."""
        groups, notes = {}, {}
        scored = self._scored(trainer, pl_module)
        if scored:
            rollout = (trainer.global_step - 1) // updates_per_rollout(trainer)
            groups[f"rollout {rollout}"] = scored
            notes[f"rollout {rollout}"] = SCORED
        for name, views in self._validated.items():
            title = f"validation on {name}" if name else "validation"
            groups[title], notes[title] = views, UNSCORED
        return Section(f"after {trainer.global_step} optimizer steps", notes, groups)

    def _scored(self, trainer: pl.Trainer, pl_module: TrainedModule) -> list[SampleView]:
        places = [(n, row) for n, (batch, _) in enumerate(self._step) for row in range(len(batch))]
        groups = [int(self._step[n][0].group_ids[row]) for n, row in places]
        correct = [bool(self._step[n][0].correct[row]) for n, row in places]
        data = rollout_data(trainer)
        judged = () if data is None else data.collector.latest
        views = []
        cut = [n for batch, lp in self._step for n in cut_tokens(batch, lp, pl_module.objective)]
        for place in choose(groups, correct, self.completions, cut):
            (batch, logprobs), row = self._step[places[place][0]], places[place][1]
            one = batch.select([row])
            scores = logprobs[row : row + 1, : one.completion_ids.shape[1]]
            views += scored_views(one, scores, pl_module.objective, pl_module.tokenizer, judged)
        return views

    def _show(self, trainer: pl.Trainer, pl_module: TrainedModule) -> None:
        folder = run_folder(trainer)  # a collective: all ranks
        self._shown = trainer.global_step
        if self.completions and trainer.is_global_zero and not is_trial_run(trainer):
            file = folder / "samples.html"
            write_or_warn(file, lambda: self._write(trainer, pl_module, file))

    def _write(self, trainer: pl.Trainer, pl_module: TrainedModule, file: Path) -> None:
        section = self.section(trainer, pl_module)
        if not section.groups:
            return
        self.sections = [section, *self.sections][: self.moments]
        heading = f"Samples of {type(pl_module.objective).__name__}"
        page = render(heading, self.sections, self.max_tokens)
        file.write_text(page, encoding="utf-8", errors="replace")
        log_samples(trainer.loggers, section, trainer.global_step)
