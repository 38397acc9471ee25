"""Which device a train engine runs on."""

from __future__ import annotations

import torch

from ringasync.config.schema import LearnerConfig
from ringasync.errors import ConfigError


def visible_gpus() -> int:
    """How many CUDA devices ``CUDA_VISIBLE_DEVICES`` and the torch build leave."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def settled(name: str) -> str:
    """``name`` of a device, where ``auto`` is ``cuda`` if there is such a device, else ``cpu``."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def resolve_device(name: str, setting: str = "learner.device") -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` means here.

    A CUDA device is made the calling thread's current one, because kernels that take no device
    (Triton's, the random generator's) follow that. Devices are counted among those that
    ``CUDA_VISIBLE_DEVICES`` leaves.

    Raises:
        ConfigError: a device that this machine does not have.
    """
    device = torch.device(settled(name))
    if device.type != "cuda":
        return device
    present = visible_gpus()
    if (device.index or 0) >= present:
        raise ConfigError(
            f"{setting} = {name!r}, but {present} CUDA devices are visible: set 'auto' or 'cpu', "
            "or look at CUDA_VISIBLE_DEVICES and the installed torch build"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def arithmetic(settings: LearnerConfig) -> str:
    """What decides how sums are rounded: device, its instructions or name, threads,
    ranks where there are several, the ZeRO stage of DeepSpeed, torch.

    Where it is the same, a CPU gives the same bits; a GPU adds in no fixed order.
    """
    device = resolve_device(settings.device)
    versions = f"torch {torch.__version__}"
    if settings.ranks > 1:
        versions = f"{settings.ranks} ranks, {versions}"
    if settings.backend == "deepspeed":
        versions = f"ZeRO {settings.zero_stage_of_deepspeed}, {versions}"
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}, {versions}"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"cpu {instructions}, threads {settings.threads}, {versions}"


def release_cuda_caches() -> None:
    """Give back what torch keeps on CUDA devices for later: free blocks, cuBLAS workspaces.

    On an H100 the workspaces are 64 MiB; torch makes them again at the next matrix product.
    """
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # there is no public name
    if clear is not None:
        clear()
    torch.cuda.empty_cache()
