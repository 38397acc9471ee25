"""The verdict on replayed losses, which depends on where they were computed."""

from __future__ import annotations

import pytest

from learner.replay_report import Comparison

CPU, OTHER_CPU, GPU = "cpu avx2, 1 thread, torch 2", "cpu avx512, 8 threads, torch 2", "NVIDIA H100"


def differing_step(losses: list[tuple[float, float]], recorded: str, replayed: str) -> int | None:
    """The first step found to differ; ``losses`` are (recorded, replayed) by step from 1."""
    steps = {
        step: {"step": step, "loss": was, "arithmetic": recorded}
        for step, (was, _) in enumerate(losses, 1)
    }
    comparison = Comparison(steps, replayed)
    for step, (_, now) in enumerate(losses, 1):
        comparison.add({"step": step, "loss": now})
    return comparison.first.step if comparison.first else None


def test_one_cpu_arithmetic_must_give_the_same_bits() -> None:
    assert differing_step([(0.5, 0.5), (0.25, 0.25)], CPU, CPU) is None
    assert differing_step([(0.5, 0.5), (0.25, 0.2500000001)], CPU, CPU) == 2


def test_another_cpu_must_come_near() -> None:
    assert differing_step([(0.5, 0.500001)], CPU, OTHER_CPU) is None
    assert differing_step([(0.5, 0.5), (0.5, 0.50001)], CPU, OTHER_CPU) == 2


@pytest.mark.parametrize(("recorded", "replayed"), [(GPU, GPU), (GPU, CPU), (CPU, GPU)])
def test_a_gpu_is_judged_by_its_first_step(recorded: str, replayed: str) -> None:
    assert differing_step([(0.5, 0.503), (0.5, 0.6)], recorded, replayed) is None
    assert differing_step([(0.5, 0.51), (0.5, 0.5)], recorded, replayed) == 1
