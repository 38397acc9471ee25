"""Every Prometheus metric that a role exports: name, unit, and where its value comes from.

``docs/metrics.md`` holds this table for people; a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

PREFIX = "ringasync_"
BASE_LABELS = ("run", "role", "worker")
"""On every metric; ``worker`` is the stable name of a worker or grader, else empty."""

Kind = Literal["counter", "gauge"]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric. ``key`` is what the role itself calls the value; ``label`` splits a mapping."""

    roles: tuple[str, ...]
    kind: Kind
    name: str
    """As scraped: with the prefix, and ``_total`` on a counter."""
    key: str
    meaning: str
    label: str = ""


_Row = tuple[Kind, str, str, str] | tuple[Kind, str, str, str, str]

_COORDINATOR: tuple[_Row, ...] = (
    ("gauge", "run_step", "learner_step", "finished learner steps"),
    ("gauge", "run_policy_version", "policy_version", "newest published policy version"),
    ("gauge", "run_paused", "paused", "1: a person paused the run"),
    ("gauge", "feeding_paused", "paused_feeding", "1: the quarantine breaker stopped feeding"),
    ("gauge", "stalled", "stall", "1: nothing moves; the log and `top` say who owes what"),
    ("gauge", "sessions", "sessions", "roles with a session, late ones included", "of_role"),
    ("gauge", "late_sessions", "late_sessions", "sessions whose heartbeat is overdue"),
    ("counter", "accepted_tokens", "accepted_tokens", "policy tokens that the broker accepted"),
    ("gauge", "ledger_tokens", "ledger", "accepted tokens by the account they are in", "account"),
    (
        "gauge",
        "ledger_difference_tokens",
        "ledger_difference",
        "sum of the accounts less the accepted tokens; anything but 0 is a bug",
    ),
    ("gauge", "open_groups", "open_groups", "groups admitted whose rollouts are not all graded"),
    ("gauge", "open_rollouts", "open_rollouts", "train rollouts queued, parked or leased"),
    ("gauge", "running_rollouts", "running_rollouts", "train rollouts leased to a worker"),
    ("gauge", "queued_tickets", "queued_tickets", "tickets that wait for a worker"),
    ("gauge", "grading_jobs", "grading_jobs", "finished rollouts without a verdict"),
    ("gauge", "eval_open_rollouts", "eval_open", "held-out rollouts under way"),
    ("gauge", "ready_groups", "ready_groups", "groups that may be trained"),
    ("gauge", "ready_tokens", "ready_tokens", "tokens of those groups"),
    ("gauge", "reserved_tokens", "reserved_tokens", "tokens reserved for a batch"),
    ("gauge", "taken_tokens", "taken_tokens", "tokens journalled and not yet trained"),
    ("counter", "groups_ended", "groups_ended", "training groups by how they ended", "end"),
    ("gauge", "eval_reward", "eval_reward", "mean held-out reward of the last evaluation"),
)

_LEARNER: tuple[_Row, ...] = (
    ("gauge", "learner_step", "step", "finished learner steps of the weights in memory"),
    ("gauge", "learner_steps_wanted", "steps", "`learner.steps`"),
    ("gauge", "learner_policy_version", "policy_version", "newest version that it published"),
    ("gauge", "learner_carried_trajectories", "carried", "surplus that waits for the next batch"),
    ("counter", "learner_steps", "steps_done", "steps of this process, replayed ones included"),
    ("counter", "learner_replayed_steps", "replayed", "steps trained again after a restart"),
    ("counter", "learner_trained_tokens", "tokens_trained", "tokens trained by this process"),
    ("counter", "learner_masked_tokens", "tokens_masked", "tail tokens that the budget cut off"),
    ("counter", "learner_seconds", "seconds", "wall time of steps by part", "part"),
    ("gauge", "learner_step_seconds", "step_s", "wall time of the last step"),
    ("gauge", "learner_tokens_per_second", "tokens_per_s", "trained tokens a second, last step"),
    ("gauge", "learner_mfu_ratio", "mfu", "model FLOP utilisation of the last step"),
    ("gauge", "learner_train_reward", "train_reward", "mean reward of the last batch"),
    ("gauge", "learner_loss", "loss", "loss of the last step"),
    ("gauge", "learner_grad_norm", "grad_norm", "gradient norm before clipping, last step"),
    ("counter", "learner_grad_norm_spikes", "grad_norm_spike", "steps with an outlying norm"),
    ("gauge", "learner_rate", "lr", "learning rate of the last step"),
    ("gauge", "learner_budget_fill_ratio", "budget_fill", "trained tokens over Phi, last step"),
    ("gauge", "learner_response_length_tokens", "response_length_mean", "mean of the last batch"),
    ("gauge", "learner_staleness_mean_steps", "staleness_mean", "mean over the batch's tokens"),
    ("gauge", "learner_staleness_max_steps", "staleness_max", "largest of the batch's tokens"),
    (
        "counter",
        "learner_tokens_by_age",
        "staleness_tokens",
        "trained tokens by their staleness in steps",
        "age",
    ),
    ("gauge", "learner_mask_ratio", "mask_rate", "share of tokens that IcePop masked"),
    ("gauge", "learner_below_ratio", "below_rate", "share of tokens below the band"),
    ("gauge", "learner_above_ratio", "above_rate", "share of tokens above the band"),
    (
        "gauge",
        "learner_mask_ratio_by_age",
        "mask_rate_by_age",
        "the masked share by staleness in steps",
        "age",
    ),
    ("gauge", "learner_gap_mean_nats", "gap_mean", "mean log-prob gap of the engines at age 0"),
    ("gauge", "learner_gap_p99_nats", "gap_p99", "its 99th percentile"),
    ("gauge", "learner_checkpoint_step", "checkpoint_step", "step of the newest checkpoint"),
    (
        "gauge",
        "learner_checkpoint_failures",
        "checkpoints_failed",
        "checkpoints that this process could not write",
    ),
)

_WORKER: tuple[_Row, ...] = (
    ("counter", "worker_generated_tokens", "tokens_generated", "tokens that the engine sampled"),
    ("gauge", "worker_tokens_per_second", "tokens_per_s", "the same a second, over 10 s"),
    ("gauge", "worker_active_rollouts", "active", "rollouts being generated"),
    ("gauge", "worker_leased_rollouts", "leases", "rollouts that it holds"),
    ("counter", "worker_finished_rollouts", "finished", "rollouts generated to their end"),
    ("counter", "worker_parked_rollouts", "parked", "rollouts handed back unfinished"),
    ("gauge", "worker_held_tokens", "held_tokens", "tokens that wait for a version's canary"),
    ("gauge", "worker_unsent_tokens", "unsent_tokens", "tokens not yet sent to the broker"),
    ("gauge", "worker_policy_version", "policy_version", "policy version that it serves"),
    ("counter", "worker_swaps", "swaps", "versions taken up in mid-rollout"),
    ("counter", "worker_peer_swaps", "peer_swaps", "those out of the learner's memory"),
    (
        "counter",
        "worker_swap_seconds",
        "swap_total_s",
        "wall time of swaps, canary included, fetch left out",
    ),
    (
        "counter",
        "worker_swap_paused_seconds",
        "swap_paused_total_s",
        "the part of it in which the engine stood still",
    ),
    ("counter", "worker_prompt_tokens", "prompt_tokens", "context given to the present engine"),
    (
        "counter",
        "worker_cached_prompt_tokens",
        "cached_prompt_tokens",
        "how many of those its prefix cache had",
    ),
)

_GRADING: tuple[_Row, ...] = (
    ("gauge", "grader_jobs", "grade_jobs", "rollouts being graded"),
    ("counter", "grader_verdicts", "grade_verdicts", "verdicts given"),
    ("counter", "grader_errors", "grade_errors", "verifiers that gave no verdict"),
    ("counter", "grader_kills", "grade_kills", "verifiers killed at a limit"),
    ("counter", "grader_verdict_seconds", "verdict_total_s", "wall time of all verdicts"),
    ("gauge", "grader_verdict_max_seconds", "verdict_max_s", "the longest so far"),
)


def _families(roles: tuple[str, ...], rows: tuple[_Row, ...]) -> Iterator[Family]:
    for kind, name, key, meaning, *label in rows:
        total = "_total" if kind == "counter" else ""
        yield Family(roles, kind, f"{PREFIX}{name}{total}", key, meaning, *label)


FAMILIES: tuple[Family, ...] = (
    *_families(("coordinator",), _COORDINATOR),
    *_families(("learner",), _LEARNER),
    *_families(("worker",), _WORKER),
    *_families(("grader", "worker"), _GRADING),
)
"""A worker exports the grader's only where it grades (``grader.in_worker``)."""
