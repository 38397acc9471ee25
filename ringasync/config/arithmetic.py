"""What a run takes, before it is started: tokens, KV cache, learner memory, bytes to publish.

Printed by ``ringasync config --check``. Everything that needs the model's shape says so where it is
not known.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ringasync.config.derive import Derived, open_tokens_bound
from ringasync.config.model_shape import KNOWN_TYPES, ModelShape, read_shape
from ringasync.config.schema import Config

REDIS_BYTES_PER_TOKEN = (9, 11)
"""Measured, in memory and in the append-only file (docs/results/bench-2026-11-25.md)."""
REDIS_BYTES_PER_ROLLOUT = (900, 1100)

FULLY_SHARDED = 3
"""The ZeRO stage that FSDP2 amounts to."""


def model_shape(config: Config, model_config: Path | None = None) -> ModelShape | None:
    """The shape from ``model_config`` if given, else from ``model.path`` if that is a folder."""
    return read_shape(model_config or Path(config.model.path))


def arithmetic(config: Config, shape: ModelShape | None) -> tuple[Derived, ...]:
    """All figures in reading order: tokens, Redis, then what follows from the model's shape."""
    return (*_tokens(config), *_redis(config), *_model(config, shape))


def bytes_text(count: float) -> str:
    """A size with a binary unit, three digits or so."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _tokens(config: Config) -> Iterator[Derived]:
    schedule, longest = config.schedule, config.sampling.max_new_tokens
    phi = schedule.budget.tokens
    yield Derived("tokens a step", f"{phi:,}", "schedule.budget.tokens, Phi")
    ranks = config.learner.ranks
    if ranks > 1:
        yield Derived("tokens a step and rank", f"{phi // ranks:,}", f"Phi / {ranks} ranks")
    if schedule.mode == "rounds":
        flight, formula = schedule.pool_capacity, "schedule.pool_capacity, Omega"
    else:
        flight = -(-open_tokens_bound(config) // longest)
        formula = f"open tokens {open_tokens_bound(config):,} / max_new_tokens {longest}; at least"
    yield Derived("rollouts in flight", f"{flight:,}", formula)
    slots = config.worker.count * config.worker.max_concurrent
    yield Derived("rollouts generated at once", f"{slots:,}", "worker.count x max_concurrent")


def _redis(config: Config) -> Iterator[Derived]:
    tokens = open_tokens_bound(config)
    rollouts = -(-tokens // config.sampling.max_new_tokens)
    names = ("Redis memory for the pool", "append-only file for the pool")
    for name, a_token, a_rollout in zip(
        names, REDIS_BYTES_PER_TOKEN, REDIS_BYTES_PER_ROLLOUT, strict=True
    ):
        total = tokens * a_token + rollouts * a_rollout
        note = f"{tokens:,} open tokens x {a_token} + {rollouts:,} rollouts x {a_rollout}"
        if name.startswith("Redis") and total > config.redis.maxmemory_bytes:
            note += f"; ABOVE redis.maxmemory_bytes {bytes_text(config.redis.maxmemory_bytes)}"
        yield Derived(name, bytes_text(total), note)


def _model(config: Config, shape: ModelShape | None) -> Iterator[Derived]:
    if shape is None:
        yield Derived(
            "parameters",
            "unknown",
            f"no config.json of {', '.join(KNOWN_TYPES)} at model.path {config.model.path!r}: "
            "give one with --model-config PATH for the figures of memory",
        )
        return
    count = shape.parameters
    yield Derived("parameters", f"{count:,}", "by formula from config.json")
    active = shape.body_matrices_a_token + shape.vocab * shape.hidden
    yield Derived("of them multiplied for a token", f"{active:,}", "matrices, LM head included")
    yield from _kv(config, shape)
    yield from _learner(config, shape)
    size = count * _dtype_bytes(config)
    yield Derived("published a version", bytes_text(size), f"parameters in {config.model.dtype}")
    keep = config.weights.keep_versions
    yield Derived("published versions kept", bytes_text(size * keep), f"keep_versions {keep}")
    yield Derived("a checkpoint", bytes_text(12 * count), "12 bytes a parameter: weights, moments")
    learner = config.learner
    copied = 12 * count if learner.checkpoint_async else 0
    if learner.publish_async and config.schedule.mode == "pipelined":
        copied += size
    if copied:
        yield Derived(
            "learner's copies in main memory",
            bytes_text(copied),
            "of a checkpoint and a version, on all ranks together "
            "(learner.checkpoint_async, publish_async)",
        )


def _kv(config: Config, shape: ModelShape) -> Iterator[Derived]:
    a_token = shape.kv_values_a_token * _dtype_bytes(config)
    yield Derived(
        "KV cache a token",
        bytes_text(a_token),
        f"2 x {shape.layers} layers x {shape.kv_heads} heads x {shape.head_dim}, "
        f"{config.model.dtype}",
    )
    slots, length = config.worker.max_concurrent, config.model.max_model_len_tokens
    yield Derived(
        "KV cache a worker, expected",
        bytes_text(a_token * slots * length / 2),
        f"{slots} rollouts at half of {length} tokens; an engine with less queues them",
    )
    yield Derived(
        "KV cache a worker, at most",
        bytes_text(a_token * slots * length),
        f"{slots} rollouts x {length} tokens",
    )


def _learner(config: Config, shape: ModelShape) -> Iterator[Derived]:
    count, ranks, stage = shape.parameters, config.learner.ranks, zero_stage(config)
    where = f"{ranks} rank{'s' if ranks > 1 else ''}, ZeRO stage {stage}"
    parts: dict[str, float] = {
        "weights, fp32 master": 4.0 * count / _shards(ranks, stage, 3),
        "gradients, fp32": 4.0 * count / _shards(ranks, stage, 2),
        "Adam moments, fp32": 8.0 * count / _shards(ranks, stage, 1),
    }
    if config.model.dtype == "bfloat16":
        # Sharded parameters are gathered, and cast, a layer at a time.
        copies = count / shape.layers if stage >= FULLY_SHARDED and ranks > 1 else count
        parts["bf16 copies of the forward"] = 2.0 * copies
    if config.loss.kl_coef > 0:
        parts["reference model, fp32"] = 4.0 * count  # whole on every rank
    parts["activations, estimate"] = activation_bytes(config, shape)
    for name, size in parts.items():
        yield Derived(f"learner: {name}", bytes_text(size), f"each rank; {where}")
    yield Derived("learner: together", bytes_text(sum(parts.values())), "each rank")


def activation_bytes(config: Config, shape: ModelShape) -> float:
    """What a micro-batch keeps for its backward, by estimate; right to a factor of two or so."""
    learner, width = config.learner, _dtype_bytes(config)
    tokens = max(learner.microbatch_tokens, config.model.max_model_len_tokens)
    layer = tokens * shape.activation_values_a_token() * width
    body = shape.layers * layer
    if learner.activation_checkpointing:
        body = shape.layers * tokens * shape.hidden * width + layer
    rows = min(learner.logprob_chunk_tokens or tokens, tokens)
    return float(body + 2 * 4 * rows * shape.vocab)  # logits and their gradient, fp32


def zero_stage(config: Config) -> int:
    """What is sharded over the ranks, as a ZeRO stage: everything by FSDP2, alone nothing."""
    if config.learner.backend == "deepspeed":
        return config.learner.zero_stage_of_deepspeed
    return FULLY_SHARDED if config.learner.ranks > 1 else 0


def _shards(ranks: int, stage: int, from_stage: int) -> int:
    return ranks if stage >= from_stage else 1


def _dtype_bytes(config: Config) -> int:
    return 4 if config.model.dtype == "float32" else 2
