"""Worker extensions with a fault, for tests of the canary.

vLLM imports the extension's module in EngineCore only, so what is patched here stays there. An
environment variable says which fault, since the module is imported once for all of its classes.
"""

from __future__ import annotations

import os
from typing import Any

from workers.engines.vllm import cpu_cures
from workers.engines.vllm.extension import RingExtension

FAULT_VARIABLE = "RINGASYNC_TEST_FAULT"


class FaultyExtension(RingExtension):
    """Installs its fault when vLLM makes the worker."""


def _uncured(model: Any) -> None:
    """What the CPU backend leaves behind stays as it is."""


if os.environ.get(FAULT_VARIABLE) == "uncured":
    cpu_cures.after_reload = _uncured

if os.environ.get(FAULT_VARIABLE) == "forgetful":
    from workers.engines.vllm.transfer import FolderTransferEngine, FolderUpdateInfo

    def _forget(self: Any, update_info: FolderUpdateInfo) -> None:
        """The swap reports success and changes nothing."""

    FolderTransferEngine.receive_weights = _forget  # type: ignore[method-assign]
