"""Reads the index of a ``torch.distributed.checkpoint`` folder without running what is in it.

torch writes the index, ``.metadata``, as a pickle, and its own reader would call whatever a changed
one names. This one knows a short list of names: the index's own classes, sizes, dtypes, paths.
"""

from __future__ import annotations

import pickle
from typing import Any, Final

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

_CHECKPOINT: Final = "torch.distributed.checkpoint"
KNOWN_NAMES: Final = frozenset(
    {
        *((f"{_CHECKPOINT}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        *(
            (f"{_CHECKPOINT}.metadata", name)
            for name in (
                *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata"),
                *("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    }
)


def _memory_format(owner: object, name: object) -> _MEM_FORMAT_ENCODING:
    """Stands for ``getattr``: Python 3.11.0 to 3.11.3 write the members of an enum as a call of it.

    Raises:
        pickle.UnpicklingError: anything but a memory format is asked for.
    """
    if owner is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"the index asks for {name!r} of {owner!r}, as no index does")
    return _MEM_FORMAT_ENCODING[str(name)]


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in KNOWN_NAMES:
            raise pickle.UnpicklingError(f"the index names {module}.{name}, which no index does")
        return super().find_class(module, name)


class IndexReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with an index that can only be an index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index. Raises ``pickle.UnpicklingError`` on anything else."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _IndexUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"the index is a {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
