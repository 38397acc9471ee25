"""Settings that are fine each by itself and cannot work together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ringasync.config.schema import Config


def impossible_pairs(config: Config) -> list[str]:
    """One sentence for each: the keys, the rule and the remedy."""
    general = (_lengths, _schedule, _replay, _rolling, _scripted)
    of_learner = (_routers, _ranks, _compiled, _deepspeed)
    return [problem for check in (*general, *of_learner) for problem in check(config)]


def _lengths(config: Config) -> Iterator[str]:
    sampling, budget = config.sampling, config.schedule.budget
    if budget.tokens < sampling.max_new_tokens:
        yield (
            f"schedule.budget.tokens ({budget.tokens}) must hold at least one rollout of "
            f"sampling.max_new_tokens ({sampling.max_new_tokens}): raise the first or lower "
            "the second"
        )
    if sampling.max_new_tokens >= config.model.max_model_len_tokens:
        yield (
            f"sampling.max_new_tokens ({sampling.max_new_tokens}) must be below "
            f"model.max_model_len_tokens ({config.model.max_model_len_tokens}): the prompt "
            "needs room"
        )


def _schedule(config: Config) -> Iterator[str]:
    schedule, worker = config.schedule, config.worker
    if schedule.group_size == 1 and schedule.filter_zero_variance:
        yield (
            "schedule.group_size = 1 gives every group zero variance, so all would be "
            "filtered: raise group_size or set schedule.filter_zero_variance = false"
        )
    if schedule.mode == "rounds" and schedule.pool_capacity < schedule.group_size:
        yield (
            f"schedule.pool_capacity ({schedule.pool_capacity}) must hold one group of "
            f"schedule.group_size ({schedule.group_size})"
        )
    if schedule.colocated and schedule.mode != "rounds":
        yield (
            f"schedule.colocated = true needs schedule.mode = 'rounds', not {schedule.mode!r}: "
            "only rounds have a moment at which nobody generates; set the mode, or give "
            "learner and workers devices of their own (learner.device, worker.gpus)"
        )
    if schedule.colocated and config.weights.transport == "nccl":
        yield (
            "schedule.colocated = true cannot go with weights.transport = 'nccl': the learner has "
            "left the device when the workers would pull from it; use 'file'"
        )
    if worker.heartbeat_ms * 3 > worker.session_ttl_ms:
        yield (
            f"worker.session_ttl_ms ({worker.session_ttl_ms}) must be at least three times "
            f"worker.heartbeat_ms ({worker.heartbeat_ms}), or one late heartbeat ends a session"
        )


def _ranks(config: Config) -> Iterator[str]:
    learner = config.learner
    if learner.ranks == 1:
        return
    if ":" in learner.device:
        yield (
            f"learner.ranks = {learner.ranks} cannot go with learner.device = {learner.device!r}: "
            "every rank needs a GPU of its own, in order from the first visible one; set the device"
            " to 'cuda' and choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    if config.schedule.colocated:
        yield (
            f"learner.ranks = {learner.ranks} cannot go with schedule.colocated = true: shards do "
            "not leave their devices; set learner.ranks = 1 or colocated = false"
        )


def _replay(config: Config) -> Iterator[str]:
    if not config.loss.routing_replay:
        return
    if config.worker.engine != "vllm":
        yield (
            f'loss.routing_replay = true needs worker.engine = "vllm": the {config.worker.engine}'
            " engine does not return routed experts"
        )
    if config.model.path == "starter" and config.starter.architecture != "qwen3_moe":
        yield (
            'loss.routing_replay = true needs starter.architecture = "qwen3_moe": a dense model'
            " has no routing"
        )


def _rolling(config: Config) -> Iterator[str]:
    if config.worker.kv != "rolling":
        return
    rule = 'worker.kv = "rolling" cannot go with {}: use "recompute"'
    if config.worker.engine != "vllm":
        yield rule.format(f'worker.engine = "{config.worker.engine}", which recomputes by itself')
    if config.loss.routing_replay:
        yield rule.format(
            "loss.routing_replay = true: routed experts of a rollout that is submitted again in the"
            " middle of a version do not fit together"
        )
    if config.schedule.colocated:
        yield rule.format("schedule.colocated = true: an engine that slept has no KV to renew")


def _routers(config: Config) -> Iterator[str]:
    loss = config.loss
    if not (loss.router_balance_coef or loss.router_z_coef):
        return
    if config.model.path == "starter" and config.starter.architecture != "qwen3_moe":
        yield (
            "loss.router_balance_coef and loss.router_z_coef above 0 need starter.architecture = "
            '"qwen3_moe": a dense model has no router; set them to 0'
        )


def _compiled(config: Config) -> Iterator[str]:
    loss = config.loss
    hooked = {
        "loss.routing_replay = true": loss.routing_replay,
        "loss.router_balance_coef above 0": loss.router_balance_coef > 0,
        "loss.router_z_coef above 0": loss.router_z_coef > 0,
    }
    if config.learner.compile and (names := [name for name, on in hooked.items() if on]):
        yield (
            f"learner.compile = true cannot go with {', '.join(names)}: hooks on routers are no "
            "part of a compiled layer; set learner.compile = false"
        )


def _deepspeed(config: Config) -> Iterator[str]:
    learner = config.learner
    if learner.backend != "deepspeed":
        for key, value in (
            ("zero_stage", learner.zero_stage),
            ("offload_optimizer", learner.offload_optimizer or None),
        ):
            if value is not None:
                yield (
                    f"learner.{key} = {str(value).lower()} is for learner.backend = 'deepspeed', "
                    f"not {learner.backend!r}: set the backend, or leave learner.{key} out"
                )
        return
    if learner.offload_optimizer and learner.zero_stage_of_deepspeed == 0:
        yield (
            "learner.offload_optimizer = true needs learner.zero_stage 1, 2 or 3: at stage 0 the "
            "optimizer is torch's own on the device; raise the stage or set offload_optimizer = "
            "false"
        )
    if config.schedule.colocated:
        yield (
            "learner.backend = 'deepspeed' cannot go with schedule.colocated = true: its shards do "
            "not leave their devices; set learner.backend = 'torch' or colocated = false"
        )
    if learner.compile and learner.zero_stage_of_deepspeed == 3:
        yield (
            "learner.compile = true cannot go with learner.zero_stage = 3: its hooks around every "
            "module cut a compiled layer up; set learner.compile = false, another stage, or the "
            "backend to 'torch', which shards weights under compiled layers"
        )


def _scripted(config: Config) -> Iterator[str]:
    if config.worker.engine == "scripted" and config.weights.canary:
        yield (
            'worker.engine = "scripted" needs weights.canary = false: its log-probs are a hash\'s, '
            "so no version would ever pass the learner's probe"
        )
