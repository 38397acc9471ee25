"""What vLLM is asked for: engine arguments, sampling of rollouts, scoring of probes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workers.engines.base import GenerationRequest
from workers.engines.vllm import compat, plugin
from workers.engines.vllm.options import VllmOptions

PROBE_PLACES = 16
"""Places in the batch beyond ``max_concurrent``, so that a probe need not wait for a rollout."""

_EXTENSION = "workers.engines.vllm.extension.RingExtension"
_CPU_KV_BYTES = 256 << 20
_GPU_BATCHED_TOKENS = 16_384
"""What vLLM takes for offline use on large GPUs. For an AsyncLLM it would take 2,048, and after a
swap every running rollout's context is computed anew in steps of that size."""


def engine_arguments(
    weights_dir: Path,
    options: VllmOptions,
    *,
    max_model_len_tokens: int,
    max_concurrent: int,
    dtype: str,
    seed: int,
    fp32_head: bool,
    routed_experts: bool = False,
    sleep_mode: bool = False,
) -> dict[str, Any]:
    """Arguments of ``AsyncEngineArgs``; the user's own ``engine_args`` come last."""
    arguments: dict[str, Any] = {
        "model": str(weights_dir),
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "seed": seed,
        "max_model_len": max_model_len_tokens,
        "max_num_seqs": max_concurrent + PROBE_PLACES,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enforce_eager": options.enforce_eager,
        "enable_prefix_caching": options.prefix_caching,
        "logprobs_mode": "processed_logprobs",
        "scheduling_policy": "priority",  # probes before rollouts
        "disable_log_stats": True,
        "generation_config": "vllm",  # the folder's own would set top-k and the like
        "worker_extension_cls": _EXTENSION,
        "weight_transfer_config": compat.weight_transfer_config(plugin.TRANSFER_BACKEND),
    }
    if options.max_batched_tokens:
        arguments["max_num_batched_tokens"] = options.max_batched_tokens
    elif not compat.is_cpu():
        arguments["max_num_batched_tokens"] = max(_GPU_BATCHED_TOKENS, max_model_len_tokens)
    if options.kv_cache_bytes:
        arguments["kv_cache_memory_bytes"] = options.kv_cache_bytes
    if compat.is_cpu():
        # There the share of memory is only a check at the start.
        arguments |= {"gpu_memory_utilization": 0.05, "enforce_eager": True}
        arguments.setdefault("kv_cache_memory_bytes", _CPU_KV_BYTES)
    if sleep_mode:
        arguments["enable_sleep_mode"] = True
    if fp32_head:
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    if routed_experts:
        arguments[compat.ROUTED_EXPERTS_ARGUMENT] = True
    return arguments | options.engine_args


def check_request(request: GenerationRequest, window_tokens: int) -> None:
    """Raises ``ValueError`` for a request that could never run in this window."""
    context = len(request.prompt_ids) + len(request.prefix_ids)
    if not context or request.max_new_tokens < 1:
        raise ValueError(f"request {request.request_id} has no context or nothing to sample")
    if context + request.max_new_tokens > window_tokens:
        raise ValueError(
            f"{request.request_id} needs {context + request.max_new_tokens} tokens, "
            f"the window is {window_tokens}"
        )


def refusal(weights_dir: Path, error: Exception, *, routed_experts: bool) -> str:
    """Why there is no engine, and what to do. vLLM says "see root cause above", in its own log."""
    message = (
        f"vLLM cannot serve {weights_dir}: {error} Where its log says that memory is short: more "
        "by worker.engine_options.gpu_memory_utilization or kv_cache_bytes, less need by "
        "model.max_model_len_tokens, worker.max_concurrent or tensor_parallel_size = 2."
    )
    if routed_experts:
        message += (
            " It was asked for routed experts, which not every vLLM and device can return: "
            "loss.routing_replay = false does without them."
        )
    return message


def prompt(request: GenerationRequest, salt: int | None) -> dict[str, Any]:
    """A rollout's context. With a ``salt`` it finds KV of requests with the same one only."""
    found: dict[str, Any] = {"prompt_token_ids": [*request.prompt_ids, *request.prefix_ids]}
    if salt is not None:
        found["cache_salt"] = str(salt)
    return found


def sampling_params(
    request: GenerationRequest,
    temperature: float,
    stop_ids: Sequence[int],
    seed: int | None,
    *,
    routed_experts: bool = False,
) -> Any:
    """A rollout's ``SamplingParams``; ``seed`` (the worker's) only where requests are seeded.

    ``routed_experts``: a resumed rollout wants no rows of its context, but for the position that
    gives its first token.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    if seed is not None:
        # A resumed rollout must not draw again what it drew before, so its place counts too.
        seed = (request.seed * 1_000_003 + len(request.prefix_ids) + seed) & 0x7FFFFFFF
    more: dict[str, Any] = {}
    if routed_experts and request.prefix_ids:
        context = len(request.prompt_ids) + len(request.prefix_ids)
        more["routed_experts_prompt_start"] = context - 1
    return SamplingParams(
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_tokens=request.max_new_tokens,
        logprobs=0,
        stop_token_ids=list(stop_ids),
        ignore_eos=True,  # stop_token_ids says it all; the folder's own EOS is among them
        detokenize=False,
        seed=seed,
        output_kind=RequestOutputKind.DELTA,
        **more,
    )


def scoring_params() -> Any:
    """Prompt log-probs: those of the plain distribution at T = 1, past the prefix cache."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=1.0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
