"""AsyncLLM with our output processor in the place of its own."""

from __future__ import annotations

from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from workers.engines.vllm.token_sink import TokenSink


def make_async_llm(arguments: Any, sink: TokenSink) -> Any:
    """An AsyncLLM whose tokens go to ``sink``; blocks until its EngineCore serves."""

    class SinkingAsyncLLM(AsyncLLM):  # type: ignore[misc]
        """Puts the sink in place before the loop that reads EngineCore's answers begins."""

        def _run_output_handler(self) -> None:
            if self.output_handler is None:
                self.output_processor = sink
            super()._run_output_handler()

    return SinkingAsyncLLM.from_engine_args(arguments)
