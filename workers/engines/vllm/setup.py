"""What must be so before vLLM is imported: its version, and its environment variables."""

from __future__ import annotations

import os
import secrets

from ringasync.errors import EnvironmentRefusedError
from ringasync.observability.log import get_logger
from workers.engines.vllm import compat

_ALWAYS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_ON_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every worker of a host pins the same cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one child less: the model runs in EngineCore
}

_PORTS = range(20_000, 30_000)
"""Below what systems hand out by themselves."""

log = get_logger()


def prepare() -> None:
    """Check the version, set what the user has not set, import vLLM.

    Raises ``EnvironmentRefusedError`` with the remedy.
    """
    warning = compat.check_version(compat.installed_version())
    if warning:
        log.warning(warning)
    for name, value in _ALWAYS.items():
        os.environ.setdefault(name, value)
    # By itself vLLM asks the system for a free port, lets it go, and binds it seconds later: of two
    # engines that start together on one host both may get the same one.
    os.environ.setdefault("VLLM_PORT", str(secrets.choice(_PORTS)))
    try:
        if compat.is_cpu():
            for name, value in _ON_CPU.items():
                os.environ.setdefault(name, value)
        import vllm.v1.engine.async_llm  # noqa: F401
    except Exception as error:  # a broken binary raises ImportError, RuntimeError, OSError, ...
        raise EnvironmentRefusedError(
            f"vLLM cannot be imported here: {error}. On a CPU, torchvision, torchaudio and "
            "torchcodec beside a CPU build of torch break it: `make install-vllm` leaves them out"
        ) from error
