"""A verifier that errs on purpose: how often, always in the same way, and only in training."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdrl_lightning.cli.layered_yaml import load_with_base
from kdrl_lightning.errors import ConfigurationError
from kdrl_lightning.rewards import Sample, Verdict
from kdrl_lightning.rewards.base import judge
from kdrl_lightning.tiny import ErringVerifier

ROOT = Path(__file__).parents[2]


def exact(sample: Sample) -> float:
    return float(sample.text == sample.row["answer"])


def samples(text: str, count: int = 2000) -> list[Sample]:
    return [Sample(text, [], {"prompt": f"question {i}", "answer": "yes"}) for i in range(count)]


def accepted(verifier: ErringVerifier, text: str) -> list[bool]:
    verdicts = judge(verifier, samples(text))
    assert all(isinstance(v, Verdict) and v.reward == float(v.correct) for v in verdicts)
    return [v.correct for v in verdicts if isinstance(v, Verdict)]


@pytest.mark.parametrize(("wrong", "right"), [(0.0, 0.0), (0.3, 0.0), (0.6, 0.2), (1.0, 1.0)])
def test_the_fractions_of_errors_are_those_that_are_set(wrong: float, right: float) -> None:
    verifier = ErringVerifier(exact, wrong, right)
    # 2,000 draws: a standard deviation is at most 0.011, and the ends are exact.
    near = 0.0 if wrong in (0.0, 1.0) else 0.04
    assert sum(accepted(verifier, "no")) / 2000 == pytest.approx(wrong, abs=near)
    assert sum(accepted(verifier, "yes")) / 2000 == pytest.approx(1.0 - right, abs=near)


def test_an_error_depends_on_seed_prompt_and_text_alone() -> None:
    verdicts = accepted(ErringVerifier(exact, 0.5), "no")
    assert accepted(ErringVerifier(exact, 0.5), "no") == verdicts
    one_by_one = [ErringVerifier(exact, 0.5)(sample) for sample in samples("no", 50)]
    assert [v.correct for v in one_by_one if isinstance(v, Verdict)] == verdicts[:50]
    for other in (accepted(ErringVerifier(exact, 0.5, seed=1), "no"), verdicts[1:] + verdicts[:1]):
        assert 0.4 < sum(a != b for a, b in zip(verdicts, other, strict=True)) / 2000 < 0.6
    assert (
        0.4
        < sum(
            a != b
            for a, b in zip(verdicts, accepted(ErringVerifier(exact, 0.5), "perhaps"), strict=True)
        )
        / 2000
        < 0.6
    )


def test_more_errors_contain_the_fewer() -> None:
    few, many = (accepted(ErringVerifier(exact, wrong), "no") for wrong in (0.3, 0.6))
    assert all(m for f, m in zip(few, many, strict=True) if f)


def test_a_verdict_that_is_not_turned_passes_whole_and_a_failure_too() -> None:
    kept = Verdict(0.25, False, {"format": 1.0})
    assert ErringVerifier(lambda s: kept)(samples("no", 1)[0]) == kept

    def fails(sample: Sample) -> float:
        raise ValueError("no judge")

    (failed,) = judge(ErringVerifier(fails, 1.0, 1.0), samples("no", 1))
    assert isinstance(failed, ValueError)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accepts_wrong": 1.5}, r"^`accepts_wrong` must be .*: got 1.5"),
        ({"rejects_right": -0.1}, r"^`rejects_right` must be .*: got -0.1"),
        ({"seed": -1}, r"^`seed` must be .*: got -1"),
    ],
)
def test_what_is_no_fraction_is_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        ErringVerifier(exact, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("files", [("rlad.yaml",), ("grpo.yaml", "base/erring_verifier.yaml")])
def test_it_errs_in_training_and_never_in_validation(
    files: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    from kdrl_lightning.cli.main import KDRLCLI

    flags = [f"--config={ROOT / 'configs' / file}" for file in files]
    cli = KDRLCLI.run(flags, instantiate_only=True)
    printed = capsys.readouterr()
    assert "note:" not in printed.out + printed.err  # no setting of the base is lost by accident
    data, shares = cli.datamodule, {}
    for name, prompts in {"training": data.train_prompts, "validation": data.val_prompts}.items():
        rows = [prompts[i] for i in range(512)]
        assert {row["source"] for row in rows} == {name}
        verdicts = judge(data.rewards.reward, [Sample("#0", [], row) for row in rows])
        shares[name] = sum(v.correct for v in verdicts if isinstance(v, Verdict)) / 512
    assert shares["validation"] == 0.0
    assert shares["training"] == pytest.approx(0.3, abs=0.08)  # four standard deviations


def test_the_main_job_has_the_task_of_the_overlay() -> None:
    job, overlay = (
        load_with_base(path.read_text(), str(path))["data"]
        for path in (ROOT / "configs/rlad.yaml", ROOT / "configs/base/erring_verifier.yaml")
    )
    assert {name: job[name] for name in overlay} == overlay
