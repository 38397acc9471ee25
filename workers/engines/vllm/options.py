"""Tuning of vLLM, from ``worker.engine_options``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """Defaults suit one small model on one device; sizes in bytes, durations in ms or s.

    ``kv_cache_bytes``: KV cache; 0 leaves it to ``gpu_memory_utilization`` on a GPU and means
    256 MiB on a CPU. ``staging``: where the next weights wait while generation goes on:
    ``device`` makes the shortest stall and holds a second copy of the weights there, ``host`` keeps
    them in main memory; ``auto`` takes the device when a quarter of its free memory holds them.
    """

    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.85
    kv_cache_bytes: int = 0
    enforce_eager: bool = False
    prefix_caching: bool = True
    max_batched_tokens: int = 0
    """Most tokens of one step; 0: 16,384 on a GPU, vLLM's own choice on a CPU."""
    gather_ms: int = 20
    """How long tokens gather before ``outputs`` hands them out, unless a request ends."""
    seeded_requests: bool = False
    """Draw each request from a generator of its own (repeatable whatever else is in the batch); on
    a GPU the sampler then goes row by row, which is slow with hundreds of rollouts."""
    pack_logprobs: bool = True
    """Let a step's log-probs travel as one array; ``False`` leaves vLLM's scheduler as it is."""
    staging: Literal["auto", "device", "host"] = "auto"
    load: Literal["auto", "layerwise", "direct"] = "auto"
    """How staged weights get into the live model: by vLLM's layerwise reload, or copied straight
    into the parameters. ``auto`` copies when every tensor's place in the live model is known."""
    sleep_level: Literal[1, 2] = 1
    """``schedule.colocated``: 1 keeps a copy of the weights in main memory while the learner has
    the device. 2 lets them go: nothing is copied, but of what was on the device beside parameters
    and buffers nothing comes back."""
    stage_timeout_s: float = 300.0
    swap_timeout_s: float = 120.0
    """An engine that does not answer within this is taken for dead."""
    start_timeout_s: float = 900.0
    engine_args: dict[str, Any] = field(default_factory=dict)
    """Passed on to ``AsyncEngineArgs`` as they are, over everything else."""
