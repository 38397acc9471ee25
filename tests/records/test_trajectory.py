"""Segments of several workers and versions join into one response, or are refused."""

from __future__ import annotations

import numpy as np
import pytest

from ringasync.errors import SchemaError
from ringasync.records.segment import Segment, policy_segment
from ringasync.records.trajectory import Trajectory, join_segments


def test_three_spans_keep_their_versions_and_logprobs() -> None:
    flat = join_segments(
        [
            policy_segment(0, 3, [1, 2], [-0.1, -0.2]),
            Segment("environment", 2, 3, np.asarray([9], np.int32), np.zeros(0, np.float32)),
            policy_segment(3, 4, [3], [-0.3]),
            policy_segment(4, 5, [4, 5], [-0.4, -0.5]),
        ]
    )
    assert flat.token_ids.tolist() == [1, 2, 9, 3, 4, 5]
    assert flat.policy_versions.tolist() == [3, 3, 3, 4, 5, 5]
    assert flat.loss_mask.tolist() == [True, True, False, True, True, True]
    np.testing.assert_allclose(flat.behavior_logprobs, [-0.1, -0.2, 0, -0.3, -0.4, -0.5])
    trajectory = Trajectory(
        "g.0",
        "g",
        "sum",
        np.asarray([7], np.int32),
        flat.token_ids,
        flat.behavior_logprobs,
        flat.policy_versions,
        flat.loss_mask,
        1.0,
        "stop",
    )
    assert (trajectory.num_tokens, trajectory.num_policy_tokens) == (6, 5)


@pytest.mark.parametrize(
    ("starts", "versions", "message"),
    [((0, 3), (1, 1), "expected 2"), ((0, 1), (1, 1), "expected 2"), ((0, 2), (2, 1), "falls")],
)
def test_gaps_overlaps_and_falling_versions_are_refused(
    starts: tuple[int, int], versions: tuple[int, int], message: str
) -> None:
    segments = [
        policy_segment(start, version, [1, 2], [-1.0, -1.0])
        for start, version in zip(starts, versions, strict=True)
    ]
    with pytest.raises(SchemaError, match=message):
        join_segments(segments)


def test_no_segments_give_an_empty_response() -> None:
    flat = join_segments([])
    assert flat.token_ids.shape == flat.loss_mask.shape == (0,)
