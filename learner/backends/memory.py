"""What a training step says when its memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from learner.backends.collate import MicroBatch
from ringasync.config.schema import LearnerConfig
from ringasync.errors import StepMemoryError

_SIGNS = ("DefaultCPUAllocator: can't allocate", "out of memory", "ALLOC_FAILED")
"""Of main memory, of CUDA and NCCL, of cuBLAS; they come as RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a want of memory, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def memory_explained(learner: LearnerConfig, micro_batches: Sequence[MicroBatch]) -> Iterator[None]:
    """Within it a want of memory is a ``StepMemoryError`` with the remedies that are left."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # In one line, as all errors are; torch adds a traceback of its own on some builds.
        why = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise StepMemoryError(_advice(learner, micro_batches, why)) from error


def _advice(learner: LearnerConfig, micro_batches: Sequence[MicroBatch], why: str) -> str:
    largest = max(micro_batches, key=lambda one: one.input_ids.numel())
    tokens, sequences = largest.input_ids.numel(), len(largest.owners)
    remedies = []
    if sequences > 1:
        remedies.append(f"lower learner.microbatch_tokens (now {learner.microbatch_tokens})")
    chunk = learner.logprob_chunk_tokens
    if chunk == 0 or chunk > 1:
        remedies.append(f"lower learner.logprob_chunk_tokens (now {chunk or '0, all at once'})")
    if not learner.activation_checkpointing:
        remedies.append("set learner.activation_checkpointing = true")
    remedies.append(f"raise learner.ranks (now {learner.ranks})")
    return (
        f"out of memory in the training step: its largest micro-batch has {tokens} tokens in "
        f"{sequences} {'sequence' if sequences == 1 else 'sequences'} ({why}). "
        f"One of: {'; '.join(remedies)}. Nothing is lost: started again, also with these "
        "settings changed, the learner goes on from its last checkpoint and the journal"
    )
