"""vLLM in the process of students whose architectures need care, in a separate process."""

from __future__ import annotations

from helpers.with_vllm.need import ROOT, need_vllm, run


def test_architectures_beside_a_student() -> None:
    need_vllm()
    cases = str(ROOT / "tests/engines/vllm/architecture_cases.py")
    out = run(["pytest", "-n0", "-W", "default", "-q", cases], ROOT, timeout=900)
    assert out.returncode == 0, out.stdout[-6000:]
    assert "15 passed" in out.stdout
