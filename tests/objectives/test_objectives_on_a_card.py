"""Every preset on a pretended GPU: the CPU's loss, gradient and statistics.

Neither an update nor its statistics make the host wait.
"""

from __future__ import annotations

import pytest
import torch

from helpers.objective_steps import PRESETS, graded, make, ready, step, student
from helpers.pretend_cuda import Card, MixedDevicesError, pretend_cuda, to_card
from kdrl_lightning.callbacks.reports.token_stats import MicroBatch, add_imitation_stats
from kdrl_lightning.metrics import StepStats

# Once per rollout, `prepare` may wait to find out which rows, groups or tokens it is about.
EACH_ROLLOUT = 9


@pytest.mark.parametrize("name", PRESETS)
def test_an_update_on_a_card_is_the_cpus(name: str) -> None:
    batch = ready(make(name), step())
    scores = student(batch)
    loss, gradients = graded(make(name), batch, scores)
    with pretend_cuda() as waits:
        here = step().to("cuda")
        waits.clear()
        here = make(name).prepare(here)
        assert sum(waits.values()) <= EACH_ROLLOUT, dict(waits)
        here = here.replace(totals=batch.totals)
        tables = {
            n: None if x is None else to_card(x.detach()) for n, x in scores._asdict().items()
        }
        leaves = scores._replace(
            **{n: None if x is None else x.requires_grad_() for n, x in tables.items()}
        )
        waits.clear()
        found, slopes = graded(make(name), here, leaves)
        assert not waits, dict(waits)
        waits.clear()
        stats, micro = StepStats(), MicroBatch(make(name), here, leaves.logprobs.detach())
        add_imitation_stats(stats, micro)
        assert not waits, dict(waits)
        measured = stats.compute()
    assert isinstance(found, Card)
    plain = StepStats()
    add_imitation_stats(plain, MicroBatch(make(name), batch, scores.logprobs.detach()))
    assert measured == pytest.approx(plain.compute())
    torch.testing.assert_close(found.inner, loss)
    for table, slope in gradients.items():
        mine = slopes[table]
        torch.testing.assert_close(mine.inner if isinstance(mine, Card) else mine, slope)


def test_scores_of_the_host_and_a_batch_of_the_card_do_not_mix() -> None:
    objective = make("kdrl")
    batch = ready(objective, step())
    with pretend_cuda(), pytest.raises(MixedDevicesError):
        graded(objective, batch.to("cuda"), student(batch))
