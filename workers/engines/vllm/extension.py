"""Methods that vLLM's worker gets from us; called by name through ``collective_rpc``.

Names begin with ``ring_``, so that they clash with none of vLLM's. Arguments and answers are plain
values: they cross a process boundary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringasync.observability.log import get_logger
from ringasync.weights.manifest import load_manifest
from workers.engines.vllm import plugin
from workers.engines.vllm.live_layout import LiveLayout
from workers.engines.vllm.staging import STAGER

# Imported in each worker before the engine is built: where the package is not installed and its
# entry point is not seen, this registers the transfer engine and the watchdog.
plugin.register()

log = get_logger()


class RingExtension:
    """Mixed into vLLM's ``Worker``."""

    device: Any
    model_runner: Any

    def ring_stage(self, weights_dir: str, where: str, manifest: str = "") -> None:
        """Begin to stage a version beside generation; see ``ring_stage_state``.

        ``manifest`` is that of ``dump_manifest``: what to compare with, and where to pull from.
        """
        told = load_manifest(manifest) if manifest else None
        STAGER.begin(Path(weights_dir), where, self.device, told)

    def ring_restage(self) -> None:
        """Read the last folder again if its tensors were let go."""
        STAGER.again()

    def ring_stage_state(self) -> str:
        """``empty``, ``reading``, ``ready`` or ``failed: why``."""
        return STAGER.state

    def ring_stage_way(self) -> tuple[str, str]:
        """How what is staged came, and why by file if it could not be pulled."""
        staged = STAGER.staged
        return (staged.way, staged.why_file) if staged is not None else ("", "")

    def ring_read_back(self) -> dict[str, str]:
        """Digest of each staged tensor, or what is wrong with its live values. Lets them go."""
        staged = STAGER.staged
        if staged is None:
            return {}
        differing, unknown = LiveLayout(self.model_runner.model).differing(staged.tensors)
        if unknown and not getattr(self, "_ring_warned", False):
            self._ring_warned = True
            log.warning(
                "tensors whose place in vLLM's model is not known are not read back",
                tensors=len(unknown),
                of=len(staged.tensors),
                first=sorted(unknown)[:3],
            )
        answer = {
            name: "differs: live values are not those of the file" if name in differing else digest
            for name, digest in staged.digests.items()
        }
        STAGER.let_go()
        return answer
