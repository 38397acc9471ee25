"""What follows from the settings: printed by ``ringasync config``, never set by hand.

Symbols as in the paper: Phi the token budget, Omega the pool's capacity, sigma the retention limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ringasync.config.schema import Config

BYTES_PER_TOKEN = 10
"""What an open token takes in Redis: 9 bytes of token id and log-prob, and some headers."""


@dataclass(frozen=True, slots=True)
class Derived:
    """One figure: what it is called, its value with the unit, and the sum it comes from."""

    name: str
    value: str
    formula: str


def prompt_room_tokens(config: Config) -> int:
    """Longest prompt that leaves room for a whole answer."""
    return config.model.max_model_len_tokens - config.sampling.max_new_tokens


def longest_group_tokens(config: Config) -> int:
    """Tokens of one group when every sibling runs to its limit."""
    return config.schedule.group_size * config.sampling.max_new_tokens


def min_groups_a_step(config: Config) -> int:
    """Groups that a learner step holds when all their rollouts are as long as allowed."""
    return -(-config.schedule.budget.tokens // longest_group_tokens(config))


def open_tokens_bound(config: Config) -> int:
    """Tokens, by estimate, in groups admitted and not yet trained or ended otherwise.

    Pipelined: (max_staleness + 1) x Phi, the admission gate. Rounds: Omega rollouts at full length
    plus what already waits for the step, which is Phi and one last group.
    """
    schedule = config.schedule
    if schedule.mode == "pipelined":
        return (schedule.max_staleness + 1) * schedule.budget.tokens
    in_pool = schedule.pool_capacity * config.sampling.max_new_tokens
    return in_pool + schedule.budget.tokens + longest_group_tokens(config)


def regenerated_tokens_bound(config: Config) -> int:
    """Most tokens of one rollout generated again when its worker is killed (canary aside)."""
    return 2 * config.worker.flush_tokens


def derive(config: Config) -> tuple[Derived, ...]:
    """All figures that follow from the settings, in reading order."""
    return tuple(_derive(config))


def _derive(config: Config) -> Iterator[Derived]:
    schedule, sampling, learner = config.schedule, config.sampling, config.learner
    phi, size, longest = schedule.budget.tokens, schedule.group_size, sampling.max_new_tokens
    yield Derived(
        "room for the prompt",
        f"{prompt_room_tokens(config)} tokens",
        f"max_model_len_tokens {config.model.max_model_len_tokens} - max_new_tokens {longest}",
    )
    yield Derived(
        "tokens of the longest group",
        f"{longest_group_tokens(config)} tokens",
        f"group_size {size} x max_new_tokens {longest}",
    )
    yield Derived(
        "groups in a step, at least",
        str(min_groups_a_step(config)),
        f"Phi {phi} / longest group {longest_group_tokens(config)}, rounded up",
    )
    yield Derived(
        "rollouts in a step, at least",
        str(-(-phi // longest)),
        f"Phi {phi} / max_new_tokens {longest}, rounded up",
    )
    yield from _derive_bounds(config)
    yield Derived(
        "tokens trained in the whole run",
        f"{learner.steps * phi} tokens",
        f"steps {learner.steps} x Phi {phi}",
    )
    yield Derived(
        "optimizer updates",
        str(learner.steps * learner.updates_per_batch),
        f"steps {learner.steps} x updates_per_batch {learner.updates_per_batch}",
    )
    if config.loss.kl_coef > 0:
        yield Derived(
            "reference policy, memory of the learner's device",
            "4 bytes a parameter",
            f"loss.kl_coef {config.loss.kl_coef} keeps the starting model in float32",
        )
    passes = 2 + (max(0, (learner.steps - 1) // config.eval.every_steps) if _evals(config) else 0)
    yield Derived(
        "held-out rollouts",
        str(passes * config.eval.prompts),
        f"{config.eval.prompts} prompts x {passes} evaluations (first, last"
        + (f", every {config.eval.every_steps} steps)" if _evals(config) else ")"),
    )


def _derive_bounds(config: Config) -> Iterator[Derived]:
    schedule, worker = config.schedule, config.worker
    if schedule.mode == "pipelined":
        formula = f"(max_staleness {schedule.max_staleness} + 1) x Phi {schedule.budget.tokens}"
    else:
        formula = (
            f"Omega {schedule.pool_capacity} x max_new_tokens {config.sampling.max_new_tokens} "
            f"+ Phi {schedule.budget.tokens} + longest group {longest_group_tokens(config)}"
        )
    bound = open_tokens_bound(config)
    yield Derived("open tokens, at most", f"{bound} tokens", formula)
    yield Derived(
        "Redis memory for open tokens, about",
        f"{bound * BYTES_PER_TOKEN} bytes",
        f"open tokens {bound} x {BYTES_PER_TOKEN} bytes",
    )
    yield Derived(
        "staleness of a trained token, at most",
        f"{schedule.max_staleness} steps",
        "max_staleness; checked again when groups are reserved",
    )
    yield Derived(
        "generated again after a kill, at most",
        f"{regenerated_tokens_bound(config)} tokens a rollout",
        f"2 x flush_tokens {worker.flush_tokens}",
    )
    yield Derived(
        "work of a dead worker returns after",
        f"{worker.session_ttl_ms} ms",
        "session_ttl_ms",
    )
    yield Derived(
        "rollouts generated at once",
        str(worker.count * worker.max_concurrent),
        f"worker.count {worker.count} x max_concurrent {worker.max_concurrent}",
    )


def _evals(config: Config) -> bool:
    return config.eval.every_steps > 0
