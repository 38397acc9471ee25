"""Takes the next weights in, in a thread beside generation, in a process of vLLM's.

They are pulled from the learner where it offers them, else read from a folder of safetensors. One
version is staged at a time. Everything that can be wrong with it shows here, before the live model
is touched. The digests are of the very bytes that will be loaded.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ringasync.errors import PeerError
from ringasync.records.weights import WeightManifest
from workers.engines import live_weights
from workers.engines.vllm import peer_pull

_DEVICE_SHARE = 0.25
"""``auto`` stages on the device when the weights take at most this share of its free memory."""


@dataclass(slots=True)
class Staged:
    """A version's tensors (on the device or in main memory) and the digests of their bytes.

    ``way`` is how they came: ``file``, ``socket`` or ``nccl``; ``why_file`` says why they were not
    pulled although the learner offers them.
    """

    folder: Path
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    way: str = "file"
    why_file: str = ""


@dataclass(frozen=True, slots=True)
class _Wanted:
    folder: Path
    where: str
    device: torch.device
    manifest: WeightManifest | None


class Stager:
    """``state`` is ``empty``, ``reading``, ``ready`` or ``failed: why``."""

    def __init__(self) -> None:
        self.state = "empty"
        self.staged: Staged | None = None
        self._shapes: dict[str, torch.Size] | None = None
        """Of the first folder: every later one must have the same tensors."""
        self._wanted: _Wanted | None = None

    def begin(
        self,
        folder: Path,
        where: str,
        device: torch.device,
        manifest: WeightManifest | None = None,
    ) -> None:
        """Stage ``folder`` in a thread, unless it is staged already.

        With a manifest every tensor is compared with its digest there; when that holds an offer of
        the learner's, the tensors are pulled, and the files read only if that fails.
        """
        if self.state == "ready" and self.staged is not None and self.staged.folder == folder:
            return
        if manifest is None and self._wanted is not None and self._wanted.folder == folder:
            manifest = self._wanted.manifest
        self._start(_Wanted(folder, where, device, manifest), may_pull=True)

    def again(self) -> None:
        """Read the files of what was staged last, if it was let go."""
        if self.state == "empty" and self._wanted is not None:
            self._start(self._wanted, may_pull=False)

    def let_go(self) -> None:
        """Free the tensors; ``again`` brings them back."""
        if self.state == "ready":
            self.staged, self.state = None, "empty"

    def _start(self, wanted: _Wanted, *, may_pull: bool) -> None:
        self._wanted = wanted
        self.staged, self.state = None, "reading"
        threading.Thread(
            target=self._read, args=(wanted, may_pull), name="stage", daemon=True
        ).start()

    def _read(self, wanted: _Wanted, may_pull: bool) -> None:
        folder, manifest = wanted.folder, wanted.manifest
        staged, why_file = None, ""
        try:
            device = _place(folder, wanted.where, wanted.device)
            if may_pull and manifest is not None and manifest.peer is not None:
                try:
                    staged = self._pull(folder, manifest, device)
                except (PeerError, OSError, ValueError, RuntimeError) as error:
                    why_file = str(error)
            if staged is None:
                staged = self._load(folder, device)
                staged.why_file = why_file
            if manifest is not None:
                _compare(staged, manifest)
        except (OSError, SafetensorError, ValueError, RuntimeError) as error:
            self.state = f"failed: {folder} cannot be loaded: {error}"
            return
        self.staged, self.state = staged, "ready"

    def _pull(self, folder: Path, manifest: WeightManifest, device: torch.device) -> Staged:
        """Raises ``PeerError``."""
        tensors, digests, way = peer_pull.pull(manifest, device)
        staged = Staged(folder, tensors, digests, way)
        if way == "socket" and device.type == "cuda":
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            staged.tensors = {name: _moved(one, device, stream) for name, one in tensors.items()}
            stream.synchronize()
        self._check(staged)
        return staged

    def _load(self, folder: Path, device: torch.device) -> Staged:
        staged = Staged(folder)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for path in _files(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    tensor = file.get_tensor(name)
                    staged.digests[name] = live_weights.digest(tensor, tensor.dtype)
                    staged.tensors[name] = _moved(tensor, device, stream)
        if stream is not None:
            stream.synchronize()
        self._check(staged)
        return staged

    def _check(self, staged: Staged) -> None:
        shapes = {name: tensor.shape for name, tensor in staged.tensors.items()}
        if self._shapes is None:
            self._shapes = shapes
        missing = sorted(set(self._shapes) - set(shapes))
        unknown = sorted(set(shapes) - set(self._shapes))
        if missing or unknown:
            raise ValueError(
                f"it lacks tensors of the model: {missing[:3]}"
                if missing
                else f"it holds tensors the model does not have: {unknown[:3]}"
            )
        for name, shape in shapes.items():
            if shape != self._shapes[name]:
                raise ValueError(
                    f"{name} has shape {tuple(shape)}, the model's is {tuple(self._shapes[name])}"
                )


def _compare(staged: Staged, manifest: WeightManifest) -> None:
    wrong = [one.name for one in manifest.tensors if staged.digests.get(one.name) != one.digest]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors are not those of the manifest, {wrong[0]} among them"
        )


def _files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError("it holds no .safetensors file")
    return files


def _place(folder: Path, where: str, device: torch.device) -> torch.device:
    cpu = torch.device("cpu")
    if device.type != "cuda" or where == "host":
        return cpu
    if where == "auto":
        size = sum(path.stat().st_size for path in _files(folder))
        free, _ = torch.cuda.mem_get_info(device)
        return device if size <= _DEVICE_SHARE * free else cpu
    return device


def _moved(
    tensor: torch.Tensor, device: torch.device, stream: torch.cuda.Stream | None
) -> torch.Tensor:
    if stream is None:
        return tensor
    with torch.cuda.stream(stream):
        return tensor.pin_memory().to(device, non_blocking=True)


STAGER = Stager()
"""The process's own: vLLM makes the transfer engine and the extension without us."""
