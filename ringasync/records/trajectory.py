"""Trajectories: graded, finished rollouts as the learner sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ringasync.errors import SchemaError
from ringasync.records.routing import RoutedRows, join_rows
from ringasync.records.segment import Segment


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """One graded rollout, flattened from its segments.

    All response arrays have length T: ``token_ids`` int32, ``behavior_logprobs`` float32 (0 at
    environment tokens), ``policy_versions`` int32 (the version that sampled each token),
    ``loss_mask`` bool (True at policy tokens). ``prompt_ids`` is int32 [P]. ``reward`` is the
    verifier's, ``retention`` the rounds it was carried over. ``routed_experts`` is uint8 or uint16
    [P - 1 + T, L, K], row i that of input position i (see ``routing``); None: not recorded.
    """

    rollout_id: str
    group_id: str
    domain: str
    prompt_ids: npt.NDArray[np.int32]
    token_ids: npt.NDArray[np.int32]
    behavior_logprobs: npt.NDArray[np.float32]
    policy_versions: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    reward: float
    finish_reason: str
    retention: int = 0
    routed_experts: RoutedRows | None = None

    @property
    def num_tokens(self) -> int:
        """Response length T, environment tokens included."""
        return int(self.token_ids.shape[0])

    @property
    def num_policy_tokens(self) -> int:
        """Tokens the policy sampled: what the ledger and the budget count."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """All trajectories of one prompt: the unit of advantage and of reservation."""

    group_id: str
    domain: str
    trajectories: tuple[Trajectory, ...]

    @property
    def num_policy_tokens(self) -> int:
        """Policy tokens of all members."""
        return sum(member.num_policy_tokens for member in self.trajectories)


@dataclass(frozen=True, slots=True, eq=False)
class FlatResponse:
    """A rollout's segments joined: arrays of one length T, see ``Trajectory``.

    ``routed_experts`` has the rows of the T tokens last, before them what context rows there are.
    """

    token_ids: npt.NDArray[np.int32]
    behavior_logprobs: npt.NDArray[np.float32]
    policy_versions: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    routed_experts: RoutedRows | None = None


def join_segments(segments: Sequence[Segment]) -> FlatResponse:
    """Join segments in order.

    Raises ``SchemaError`` on a gap, an overlap, a falling version or routing of several shapes.
    """
    position, version = 0, 0
    for segment in segments:
        if segment.start != position:
            raise SchemaError(f"segment starts at {segment.start}, expected {position}")
        if segment.kind == "policy":
            if segment.policy_version < version:
                raise SchemaError(
                    f"version falls from {version} to {segment.policy_version} at {position}"
                )
            version = segment.policy_version
        position = segment.end
    if not segments:
        return FlatResponse(
            np.zeros(0, np.int32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int32),
            np.zeros(0, np.bool_),
        )
    return FlatResponse(
        np.concatenate([s.token_ids for s in segments]),
        np.concatenate(
            [
                s.behavior_logprobs if s.kind == "policy" else np.zeros(s.num_tokens, np.float32)
                for s in segments
            ]
        ),
        np.concatenate([np.full(s.num_tokens, s.policy_version, np.int32) for s in segments]),
        np.concatenate([np.full(s.num_tokens, s.kind == "policy", np.bool_) for s in segments]),
        join_rows([(s.num_tokens, s.routed_experts) for s in segments]),
    )
