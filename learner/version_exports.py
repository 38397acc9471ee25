"""Keeps every k-th published version as a folder of its own while the run trains."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import structlog

from ringasync.durable import sync_path
from ringasync.weights.exports import Origin, export_name, fill_export, list_exports
from ringasync.weights.manifest import VersionFields

_LEFTOVER = re.compile(r"\.tmp-v\d{6,}-f(\d+)")


class VersionExports:
    """``learner.export_every_versions``: made of the folder that is published anyway.

    An export appears only after its version was announced, so a replaced learner makes none. What
    goes wrong here (a full disk) is logged and ends nothing: the run does not need exports.
    """

    def __init__(self, root: Path, every_versions: int, keep: int) -> None:
        """``every_versions`` 0: never; ``keep`` 0: all of them."""
        self._root = root
        self._every_versions = every_versions
        self._keep = keep
        self._log = structlog.get_logger(__name__)

    def begin(self, source: Path, fields: VersionFields) -> Path | None:
        """Link or copy the folder that is about to be published, if its version is one to keep.

        To be called before the transport takes the files away. Returns what ``finish`` wants.
        """
        version, fence = fields.policy_version, fields.fence
        if not self._every_versions or version % self._every_versions:
            return None
        staged = self._root / f".tmp-{export_name(version)}-f{fence}"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._sweep(fence)
            staged.mkdir()
            fill_export(source, staged, Origin(fields.run, version, fields.learner_step), link=True)
        except OSError as error:
            shutil.rmtree(staged, ignore_errors=True)
            self._failed(version, error)
            return None
        return staged

    def finish(self, staged: Path | None, version: int) -> None:
        """Give an announced version's export its name and drop the oldest above ``keep``."""
        if staged is None:
            return
        target = self._root / export_name(version)
        try:
            staged.rename(target)
            sync_path(self._root)
            for _, path in list_exports(self._root)[: -self._keep] if self._keep else []:
                shutil.rmtree(path)
        except OSError as error:
            self._failed(version, error)
            return
        self._log.info("version exported", version=version, path=str(target))

    def _failed(self, version: int, error: OSError) -> None:
        self._log.warning(
            "version not exported: free disk space, lower learner.keep_exports, or use "
            "`ringasync export` on a checkpoint",
            version=version,
            why=str(error),
        )

    def _sweep(self, fence: int) -> None:
        """Remove what killed learners left; never what a learner of a higher fence is writing."""
        for path in self._root.iterdir():
            match = _LEFTOVER.fullmatch(path.name)
            if match and int(match[1]) <= fence:
                shutil.rmtree(path, ignore_errors=True)
