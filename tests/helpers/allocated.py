"""Peak memory of torch's CPU allocator while a function runs."""

from __future__ import annotations

from typing import Any

import torch


def allocated(work: Any) -> int:
    """Return how many bytes the allocator's peak during ``work`` is above its level before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most
