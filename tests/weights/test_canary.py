"""The canary refuses swaps that were not applied and answers that moved, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from ringasync.errors import CanaryError
from ringasync.records.weights import ProbeSequence, TensorInfo, WeightManifest
from ringasync.weights.canary import ProbeGate, compare_read_back, probe_gaps


def _manifest(probe: tuple[ProbeSequence, ...] = ()) -> WeightManifest:
    tensors = tuple(
        TensorInfo(name=f"w{i}", shape=(1,), dtype="F32", digest=f"d{i}") for i in range(8)
    )
    return WeightManifest(
        run="demo",
        policy_version=4,
        learner_step=4,
        fork_step=0,
        fence=1,
        transport="file",
        location="v000004-f1",
        shards=(),
        tensors=tensors,
        probe=probe,
    )


def _live() -> dict[str, str]:
    return {f"w{i}": f"d{i}" for i in range(8)}


def test_equal_digests_give_no_problem_and_unpublished_names_are_ignored() -> None:
    assert compare_read_back(_manifest(), _live() | {"lm_head": "tied"}) == []


def test_one_stale_tensor_is_named() -> None:
    problems = compare_read_back(_manifest(), _live() | {"w3": "old"})
    assert problems == ["1 of 8 live tensors differ from version 4: w3"]


def test_missing_and_many_differing_tensors_are_counted() -> None:
    problems = compare_read_back(_manifest(), {f"w{i}": "old" for i in range(1, 8)})
    assert problems[0] == "1 of 8 tensors of version 4 are not in the engine: w0"
    assert problems[1].startswith("7 of 8 live tensors differ")
    assert problems[1].endswith("w5 and 2 more")


def test_probe_gaps_are_absolute_and_flat() -> None:
    probe = (
        ProbeSequence(prompt_ids=(1,), token_ids=(2, 3), logprobs=(-1.0, -2.0)),
        ProbeSequence(prompt_ids=(1,), token_ids=(4,), logprobs=(-3.0,)),
    )
    scores = [np.array([-1.5, -2.0], np.float32), np.array([-2.75], np.float32)]
    np.testing.assert_allclose(probe_gaps(_manifest(probe), scores), [0.5, 0.0, 0.25])


def test_scores_of_another_length_are_refused() -> None:
    probe = (ProbeSequence(prompt_ids=(1,), token_ids=(2, 3), logprobs=(-1.0, -2.0)),)
    with pytest.raises(CanaryError, match="sequence 0"):
        probe_gaps(_manifest(probe), [np.zeros(3, np.float32)])
    with pytest.raises(CanaryError, match="0 probe sequences, not 1"):
        probe_gaps(_manifest(probe), [])


def test_the_first_load_calibrates_and_three_times_its_gap_fails() -> None:
    gate = ProbeGate(1e-3, 1e-2)
    assert gate.check(np.full(100, 0.02)).accepted
    assert gate.check(np.full(100, 0.059)).accepted
    refused = gate.check(np.full(100, 0.2))
    assert not refused.accepted
    assert "mean log-prob gap" in refused.problem
    assert refused.limit_mean == pytest.approx(3 * np.median([0.02, 0.059]))


def test_a_refused_probe_does_not_move_the_limits() -> None:
    gate = ProbeGate(1e-3, 1e-2)
    gate.check(np.full(10, 0.01))
    limits = [gate.check(np.full(10, 5.0)).limit_mean for _ in range(20)]
    assert limits == [pytest.approx(0.03)] * 20


def test_floors_let_small_noise_pass_an_exact_engine() -> None:
    gate = ProbeGate(1e-3, 1e-2)
    assert gate.check(np.zeros(100)).accepted
    assert gate.check(np.full(100, 9e-4)).accepted
    assert not gate.check(np.full(100, 1.5e-3)).accepted


def test_the_99th_percentile_alone_can_fail() -> None:
    gate = ProbeGate(1e-1, 1e-2)
    assert gate.check(np.zeros(100)).accepted
    gaps = np.zeros(100)
    gaps[:3] = 0.5
    refused = gate.check(gaps)
    assert not refused.accepted
    assert "99th percentile" in refused.problem


def test_one_wild_token_in_a_thousand_passes() -> None:
    gate = ProbeGate(0.1, 0.1)
    gaps = np.full(1000, 0.01)
    gaps[7] = 26.0
    assert gate.check(gaps).accepted


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gap_that_is_not_finite_is_refused_even_at_first(bad: float) -> None:
    gaps = np.zeros(10)
    gaps[3] = bad
    assert "1 of 10 probe tokens" in ProbeGate(1e-3, 1e-2).check(gaps).problem


def test_a_first_load_of_another_model_and_an_empty_probe_are_refused() -> None:
    gate = ProbeGate(1e-3, 1e-2)
    assert not gate.check(np.full(10, 2.0)).accepted
    assert not gate.check(np.zeros(0)).accepted
