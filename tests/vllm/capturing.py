"""Routed experts on vLLM's CPU backend, for tests: a stand-in for the part of vLLM that is missing.

vLLM 0.32 returns routed experts by Model Runner V2 alone, which needs Triton. Here vLLM's own
capturer is bound to the routers of the old runner, and the scheduler's outputs get the rows that
0.26's scheduler gives them (a dictionary by content in place of its buffer by KV slot). All else is
real: the router's choice, the messages, the engine, prefix cache, swaps.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import (
    RoutedExpertsCapturer,
    bind_routed_experts_capturer,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from workers.engines.vllm.extension import RingExtension

_steps: deque[dict[str, tuple[int, npt.NDArray[np.uint8]]]] = deque()
"""Of each step: the requests' first position read and their rows."""
_by_content: dict[tuple[int, ...], npt.NDArray[np.uint8]] = {}
"""Row of the last of these tokens."""


class CapturingExtension(RingExtension):
    """vLLM imports its module in EngineCore, where the model runs too on a CPU."""


_execute_model = GPUModelRunner.execute_model
_update_from_output = Scheduler.update_from_output


def _capture(self: Any, scheduler_output: Any, *args: Any, **more: Any) -> Any:
    if not hasattr(self, "_test_capturer"):
        most = self.vllm_config.scheduler_config.max_num_batched_tokens
        self._test_capturer = RoutedExpertsCapturer(most, self.vllm_config)
        bind_routed_experts_capturer(self.model, self._test_capturer)
    answer = _execute_model(self, scheduler_output, *args, **more)
    counts = scheduler_output.num_scheduled_tokens
    starts = {one.req_id: one.num_computed_tokens for one in scheduler_output.scheduled_new_reqs}
    cached = scheduler_output.scheduled_cached_reqs
    starts.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    rows = self._test_capturer.snapshot_routing_data(sum(counts.values())).numpy()
    step, at = {}, 0
    for name in self.input_batch.req_ids if counts else ():
        step[name] = (starts[name], rows[at : at + counts[name]])
        at += counts[name]
    _steps.append(step)
    return answer


def _give(self: Any, scheduler_output: Any, runner_output: Any) -> Any:
    requests = {name: self.requests[name] for name in _steps[0] if name in self.requests}
    fresh = {name for name, one in requests.items() if one.num_output_tokens == 0}
    for name, (start, rows) in _steps.popleft().items():
        if name in requests:
            tokens = tuple(requests[name].all_token_ids)
            for offset, row in enumerate(rows):
                _by_content[tokens[: start + offset + 1]] = row
    messages = _update_from_output(self, scheduler_output, runner_output)
    for message in messages.values():
        for output in message.outputs:
            if not output.new_token_ids:
                continue
            request = requests[output.request_id]
            tokens = tuple(request.all_token_ids)
            end = len(tokens) - 1
            start = end - len(output.new_token_ids)
            if output.request_id in fresh:
                start = request.sampling_params.routed_experts_prompt_start
            output.routed_experts = np.stack(
                [_by_content[tokens[: p + 1]] for p in range(start, end)]
            )
    return messages


GPUModelRunner.execute_model = _capture
Scheduler.update_from_output = _give
