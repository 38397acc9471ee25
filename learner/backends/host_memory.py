"""Main memory that state is copied to, so that training may change it while a copy is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class HostMemory:
    """A copy of some tensors; its memory is kept for the next copy.

    Pinned where a tensor lies on a CUDA device: a copy from there then runs at the speed of the
    bus. Pinned memory is somewhat more than asked for: torch rounds each tensor up to a power of
    two.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(
        self, tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype] | None = None
    ) -> dict[str, Tensor]:
        """This rank's parts by name, as ``dtypes`` says (cast before, on their device), or as they
        are. The copy is whole on return, and good until the next one.

        Raises ``MemoryError`` or ``RuntimeError``, after letting go of everything.
        """
        for name in self._buffers.keys() - tensors.keys():
            del self._buffers[name]
        try:
            for name, tensor in tensors.items():
                own = own_part(tensor)
                dtype = own.dtype if dtypes is None else dtypes[name]
                self._buffer(name, own, dtype).copy_(own, non_blocking=True)
        except (MemoryError, RuntimeError):
            self._buffers.clear()
            raise
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return dict(self._buffers)

    def _buffer(self, name: str, own: Tensor, dtype: torch.dtype) -> Tensor:
        found = self._buffers.get(name)
        if found is None or (found.shape, found.dtype) != (own.shape, dtype):
            pinned = own.is_cuda and own.numel() > 0
            found = torch.empty(own.shape, dtype=dtype, pin_memory=pinned)
            self._buffers[name] = found
        return found
