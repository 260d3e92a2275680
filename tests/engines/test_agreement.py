"""An engine whose numbers differ from the student's is found before it samples for the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.short_runs import fit, make_data, make_module, make_trainer
from kdrl_lightning import GRPO
from kdrl_lightning.callbacks import WeightSyncCheck
from kdrl_lightning.engines import Sampling, TransformersEngine
from kdrl_lightning.engines.agreement import TOKENS, bound_of, equal_weights, moved, probe
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.models.loading import load_causal_lm
from kdrl_lightning.models.lora import LoRA

pytestmark = pytest.mark.filterwarnings("ignore:.* of the (completions|groups) ")


class OtherCode(TransformersEngine):
    """Samples from a copy of the student, one of whose weights does not arrive."""

    exact = False
    compared = True

    def __init__(self, lost: float = 0.0) -> None:
        super().__init__()
        self.lost = lost
        self.asked: list[tuple[list[int], int]] = []

    def setup(self, weights: Any, eos_token_id: Any, pad_token_id: int) -> None:
        self._copy = load_causal_lm(weights.path)
        super().setup(type(weights)(self._copy, weights.path), eos_token_id, pad_token_id)

    def update_weights(self, weights: Any, version: int) -> None:
        self._copy.load_state_dict(weights.model.state_dict())
        with torch.no_grad():
            next(p for n, p in self._copy.named_parameters() if "norm" in n).add_(self.lost)
        super().update_weights(type(weights)(self._copy, weights.path), version)

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> Any:
        self.asked.append(([len(p) for p in prompts], sampling.max_tokens))
        return super().generate(prompts, seeds, sampling)


class WithoutNorms(OtherCode):
    """Computes as if all norms had their initial weights, which are one."""

    def update_weights(self, weights: Any, version: int) -> None:
        super().update_weights(weights, version)
        with torch.no_grad():
            for name, parameter in self._copy.named_parameters():
                if "norm" in name:
                    parameter.fill_(1.0)


class Sleeps(OtherCode):
    """Frees its memory between rollouts, as ``VLLMEngine`` with ``sleep`` does."""

    asleep = True

    def update_weights(self, weights: Any, version: int) -> None:
        super().update_weights(weights, version)
        self.asleep = False

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> Any:
        assert not self.asleep
        return super().generate(prompts, seeds, sampling)

    def release(self) -> None:
        if self.version is not None:
            self.asleep, self.version = True, -1


class Unseen(WeightSyncCheck):
    """The bound alone: nothing is compared in the run."""

    def compare(self, trainer: Any, pl_module: Any, batch: Any) -> None:
        """Do nothing."""


def start(tmp_path: Path, folder: str, engine: OtherCode, *callbacks: Any, **trainer: Any) -> Any:
    data = make_data(rollout_engine=engine)
    settings = {"limit_val_batches": 0, "max_steps": 4, **trainer}
    return fit(tmp_path, make_module(folder, None, GRPO()), data, list(callbacks), **settings)


@pytest.mark.parametrize("first", ["rollout", "validation"])
def test_a_weight_that_does_not_arrive_stops_before_sampling(
    tmp_path: Path, student_folder: str, first: str
) -> None:
    engine = OtherCode(lost=0.5)
    trainer = {"limit_val_batches": 1.0, "num_sanity_val_steps": 1} if first != "rollout" else {}
    words = (
        r"`rollout_engine` must give the student's log-probabilities within 0.001 nats on average: "
        r"got OtherCode, which is 0\.\d+ away for Qwen2ForCausalLM with the same weights.*"
        r"Use TransformersEngine, or raise `weight_sync.max_mean_diff`\.$"
    )
    with pytest.raises(ConfigurationError, match=words):
        start(tmp_path, student_folder, engine, **trainer)
    assert len(engine.asked) == 1  # the comparison; nothing was sampled for the run


def test_a_difference_that_training_would_uncover_stops_before_sampling(
    tmp_path: Path, student_folder: str
) -> None:
    engine = WithoutNorms()
    words = "with the same weights, after a small change of those that are all equal in their"
    with pytest.raises(
        ConfigurationError, match=f"got WithoutNorms, which is .* {words} tensor\\."
    ):
        start(tmp_path, student_folder, engine)
    assert len(engine.asked) == 1


def test_a_run_that_does_not_train_uncovers_nothing(tmp_path: Path, student_folder: str) -> None:
    engine, module = WithoutNorms(), make_module(student_folder, None, GRPO())
    make_trainer(tmp_path).validate(module, make_data(rollout_engine=engine), verbose=False)
    assert [tokens for _, tokens in engine.asked[:2]] == [TOKENS, 10]


def test_equal_numbers_are_compared_twice(tmp_path: Path, student_folder: str) -> None:
    engine = OtherCode()
    start(tmp_path, student_folder, engine, WeightSyncCheck())
    for lengths, tokens in engine.asked[:2]:  # with norms that are not one, and as they are
        assert len(set(lengths)) == 3 and tokens == TOKENS
    assert [tokens for _, tokens in engine.asked[2:]] == [10, 10]  # the rollouts of four steps


def test_an_engine_that_sleeps_gets_the_true_weights_after_the_moved_ones(
    tmp_path: Path, student_folder: str
) -> None:
    engine = Sleeps()
    start(tmp_path, student_folder, engine, WeightSyncCheck(max_mean_diff=1e-5))
    assert [tokens for _, tokens in engine.asked] == [TOKENS, TOKENS, 10, 10]


def test_weights_of_which_none_are_all_equal_are_compared_once(
    tmp_path: Path, student_folder: str
) -> None:
    engine, module = OtherCode(), make_module(student_folder, None, GRPO())
    module.configure_model()
    with torch.no_grad():
        for part in equal_weights(module.weights().model):
            part.view(-1)[0] += 0.1
    data = make_data(rollout_engine=engine)
    fit(tmp_path, module, data, [], limit_val_batches=0, max_steps=4)
    assert [tokens for _, tokens in engine.asked] == [TOKENS, 10, 10]


@pytest.mark.parametrize("raises", [False, True])
def test_moved_weights_are_restored_exactly(student_folder: str, raises: bool) -> None:
    model = load_causal_lm(student_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def changed() -> set[str]:
        now = model.state_dict()
        return {name for name in before if not torch.equal(now[name], before[name])}

    parts = equal_weights(model)
    try:
        with moved(parts):
            inside = changed()
            if raises:
                raise KeyError("any")
    except KeyError:
        assert raises
    assert inside == {name for name in before if name.endswith(("norm.weight", ".bias"))}
    assert changed() == set()


def test_only_what_is_trained_is_moved(student_folder: str) -> None:
    model = load_causal_lm(student_folder)
    LoRA(2).inject(model, 0)
    trained = dict(model.named_parameters())
    equal = {p.data_ptr() for p in equal_weights(model)}
    assert {n for n, p in trained.items() if p.data_ptr() in equal} == {
        n for n in trained if "lora_B" in n
    }


def test_the_callbacks_bound_decides(tmp_path: Path, student_folder: str) -> None:
    start(tmp_path, student_folder, OtherCode(lost=0.5), Unseen(max_mean_diff=50.0))
    with pytest.raises(ConfigurationError, match=r"within 1e-09 nats on average: got OtherCode"):
        start(tmp_path, student_folder, OtherCode(), WeightSyncCheck(max_mean_diff=1e-9))


def test_nan_is_a_difference(tmp_path: Path, student_folder: str) -> None:
    class NaNs(OtherCode):
        def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> Any:
            groups = super().generate(prompts, seeds, sampling)
            groups[0][0].logprobs[0] = float("nan")
            return groups

    with pytest.raises(ConfigurationError, match=r"got NaNs, which is nan away"):
        start(tmp_path, student_folder, NaNs())


class Words:
    """A tokenizer that gives these ids to any text."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self.ids


class Notes:
    """An engine that answers with one token."""

    version, exact = 0, False

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> Any:
        from kdrl_lightning.engines import Completion

        self.prompts, self.tokens = prompts, sampling.max_tokens
        return [[Completion([1], [-0.5], False) for _ in own] for own in seeds]


@pytest.mark.parametrize(
    ("ids", "rows", "context", "lengths", "tokens"),
    [
        (list(range(50)), 100, 1000, [50, 25, 10], 12),
        (list(range(50)), 20, 1000, [20, 10, 4], 12),  # ids without an embedding are left out
        ([], 8, 1000, [8, 4, 1], 12),
        (list(range(50)), 100, 20, [10, 5, 2], 10),  # prompt and completion fit
        (list(range(50)), 100, 2, [1, 1, 1], 1),
    ],
)
def test_what_is_asked_fits_vocabulary_and_context(
    ids: list[int], rows: int, context: int, lengths: list[int], tokens: int
) -> None:
    engine: Any = Notes()
    batch = probe(engine, Words(ids), rows, context)
    assert [len(p) for p in engine.prompts] == lengths
    assert engine.tokens == tokens
    assert max(map(max, engine.prompts)) < rows
    assert batch.rollout_logprobs is not None and len(batch) == 6


def test_the_bound_follows_the_coarser_side() -> None:
    assert bound_of("32-true", torch.float32) == bound_of("64-true", None) == 0.001
    assert bound_of("32-true", torch.bfloat16) == bound_of("bf16-mixed", torch.float32) == 0.1
