"""Faults of vLLM's CPU backend after a layerwise reload, and their cure.

Seen with 0.32: experts stay unpacked although the kernel reads them packed (their method skips the
packing on what it takes for an update), and a head that shares the embedding's weight keeps the
packed copy of the old one. Both answer without an error, wrong by several nats.
"""

from __future__ import annotations

import torch


def after_reload(model: torch.nn.Module) -> None:
    """Pack anew what the reload left as it was."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(module)
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
