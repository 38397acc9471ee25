"""The metrics of one learner step as one flat JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from learner.algorithms.metrics import mismatch_report
from learner.backends.base import StepResult
from learner.batch import TrainBatch
from learner.record import BatchRecord
from ringasync.config.schema import LossConfig
from ringasync.records.routing import known_rows, last_rows

_GAP_ALARM_NATS = 0.05
"""Mean log-prob gap at age 0 above which training "essentially fails" (Ring-1T, IcePop blog)."""


@dataclass(slots=True)
class StepTimes:
    """Seconds of one step by what they were spent on."""

    wait_s: float = 0.0
    handover_s: float = 0.0
    """``schedule.colocated``: until the workers slept, and moving the state there and back."""
    assemble_s: float = 0.0
    journal_s: float = 0.0
    train_s: float = 0.0
    checkpoint_s: float = 0.0
    publish_s: float = 0.0

    def as_metrics(self) -> dict[str, float]:
        """``time_wait_s`` and so on, and ``step_s``, their sum."""
        parts = {
            name: round(float(getattr(self, name)), 6)
            for name in (
                "wait_s",
                "handover_s",
                "assemble_s",
                "journal_s",
                "train_s",
                "checkpoint_s",
                "publish_s",
            )
        }
        named = {f"time_{name}": value for name, value in parts.items()}
        return {**named, "step_s": round(sum(parts.values()), 6)}


@dataclass(frozen=True, slots=True, eq=False)
class TrainedStep:
    """A finished step, ready to be reported."""

    record: BatchRecord
    batch: TrainBatch
    result: StepResult
    times: StepTimes = field(default_factory=StepTimes)
    replayed: bool = False


def step_metrics(done: TrainedStep, loss: LossConfig, policy_version: int) -> dict[str, Any]:
    """All metrics of a step; ``policy_version`` is the newest published one after it.

    ``train_reward`` and lengths are over the batch's trajectories; ``budget_fill`` is trained
    tokens over Phi; ``tokens_masked`` the tail that the budget cut. With ``loss.routing_replay``
    also how many trained tokens had their logits from the experts that sampled them.
    """
    record, batch, times = done.record, done.batch, done.times
    rewards = [item.trajectory.reward for item in batch.items]
    lengths = [item.trajectory.num_policy_tokens for item in batch.items]
    trained = batch.trained_tokens
    timing = times.as_metrics()
    step_s = timing["step_s"]
    return {
        "step": record.step + 1,
        "policy_version": policy_version,
        "batch_id": record.batch_id,
        "replayed": done.replayed,
        "loss": done.result.loss,
        **done.result.terms,
        "grad_norm": done.result.grad_norm,
        "lr": done.result.lr,
        "train_reward": float(np.mean(rewards)) if rewards else None,
        "tokens_trained": trained,
        "tokens_masked": sum(one.masked_tokens for one in record.order),
        "budget_fill": trained / record.budget_tokens,
        "num_groups": len(record.groups),
        "num_trajectories": len(batch.items),
        "num_carried_in": len(record.carried),
        "num_carried_out": len(record.surplus),
        "retention_max": max((item.trajectory.retention for item in batch.items), default=0),
        "response_length_mean": float(np.mean(lengths)) if lengths else None,
        "response_length_p95": float(np.quantile(lengths, 0.95)) if lengths else None,
        "versions_per_rollout_mean": _versions_per_rollout(batch),
        "reward_by_domain": _reward_by_domain(batch),
        **(_replay_metrics(batch) if loss.routing_replay else {}),
        **mismatch_report(done.result.tokens, mask_low=loss.mask_low, mask_high=loss.mask_high),
        **timing,
        **{f"time_{name}_s": round(value, 6) for name, value in done.result.seconds.items()},
        "tokens_per_s": trained / step_s if step_s > 0 else None,
    }


def log_step(log: Any, metrics: Mapping[str, Any]) -> None:
    """Say that the step of ``metrics`` is trained, and what of it should alarm."""
    step, gap = metrics["step"], metrics.get("gap_mean")
    if gap is not None and gap > _GAP_ALARM_NATS:
        log.warning("train and inference engine disagree at age 0", gap_mean=gap, step=step)
    if metrics["grad_norm_spike"]:
        log.warning(
            "gradient norm far above those of the last steps",
            grad_norm=metrics["grad_norm"],
            median=metrics["grad_norm_median"],
            step=step,
        )
    log.info(
        "step trained",
        step=step,
        reward=metrics["train_reward"],
        loss=metrics["loss"],
        tokens=metrics["tokens_trained"],
        replayed=metrics["replayed"],
    )


def _replay_metrics(batch: TrainBatch) -> dict[str, Any]:
    replayed = 0
    for item in batch.items:
        rows = item.trajectory.routed_experts
        if rows is not None:
            own = last_rows(rows, item.trajectory.num_tokens)
            replayed += int(known_rows(own)[item.trained_mask].sum())
    unknown = batch.trained_tokens - replayed
    share = replayed / batch.trained_tokens if batch.trained_tokens else None
    return {
        "tokens_routing_replayed": replayed,
        "tokens_routing_unknown": unknown,
        "routing_replayed_share": share,
    }


def _versions_per_rollout(batch: TrainBatch) -> float | None:
    counts = [np.unique(item.trajectory.policy_versions).size for item in batch.items]
    return float(np.mean(counts)) if counts else None


def _reward_by_domain(batch: TrainBatch) -> dict[str, float]:
    rewards: dict[str, list[float]] = {}
    for item in batch.items:
        rewards.setdefault(item.trajectory.domain, []).append(item.trajectory.reward)
    return {domain: float(np.mean(values)) for domain, values in sorted(rewards.items())}
