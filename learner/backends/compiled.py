"""torch.compile whose failures say what to do, and which outlives kills.

A process killed while torch builds a library leaves it cut off in torch's cache of the machine.
Torch takes whatever is there, so every later start would fail on that file. Torch builds under a
lock and only then loads, so what cannot be loaded is nobody's work in progress: it is removed and
built again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch

from learner.backends.memory import is_out_of_memory
from ringasync.errors import EnvironmentRefusedError

T = TypeVar("T")

_UNLOADABLE = re.compile(r"(/[^\s:]+\.so): (?:file too short|invalid ELF header|cannot read file)")
"""What the dynamic loader says of a library that was not written to its end."""


def compiled_program(plain: Callable[..., T]) -> Callable[..., T]:
    """``torch.compile(plain)``, built again where a file of torch's cache is cut off."""
    program: Callable[..., T] = torch.compile(plain)

    @wraps(plain)
    def run(*args: Any, **kwargs: Any) -> T:
        while True:
            try:
                return program(*args, **kwargs)
            except (RuntimeError, ImportError, OSError) as error:
                if not _removed_cut_off(error):
                    raise

    return run


@contextmanager
def compilation_explained() -> Iterator[None]:
    """Within it a program that torch cannot build is an ``EnvironmentRefusedError``.

    The program of a backward pass may be built when that is run, where it cannot be built again in
    place: a cut-off file is removed and the learner fails, to be started again.
    """
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        if is_out_of_memory(error):
            raise
        if _removed_cut_off(error) or not _is_compilers(error):
            raise  # of the first a restart is the remedy, so it is no refusal
        why = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise EnvironmentRefusedError(
            f"torch cannot compile the layers of this model on this machine ({why}). Set "
            "learner.compile = false, or mend what it names; a C++ compiler is needed on a CPU, "
            f"and room in {_cache_folder()} (TORCHINDUCTOR_CACHE_DIR). Remove that folder if a "
            "process was killed while it compiled. Nothing is lost"
        ) from error


def _is_compilers(error: BaseException) -> bool:
    from torch._dynamo.exc import BackendCompilerFailed

    return isinstance(error, BackendCompilerFailed)


def _cache_folder() -> Path:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def _removed_cut_off(error: BaseException) -> bool:
    """Whether ``error`` comes from an unloadable library of torch's cache, which is gone now."""
    found = _UNLOADABLE.search(str(error))
    if found is None:
        return False
    path = Path(found[1])
    if not path.is_relative_to(_cache_folder()):
        return False
    try:
        path.unlink(missing_ok=True)  # another rank of this host may have been first
    except OSError:
        return False
    structlog.get_logger(__name__).warning(
        "removed a library that a killed process left cut off in torch's cache", path=str(path)
    )
    return True
