"""Exported versions: HF-format folders for people, that no transport removes.

::

    runs/NAME/exports/v000040/      what the learner kept (``learner.export_every_versions``)
    runs/NAME/exports/.tmp-...      left by a killed learner, removed by the next one

Beside the published files lies ``ringasync.json``, which says what the weights are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ringasync.durable import sync_path
from ringasync.errors import MALFORMED_JSON, ManifestError
from ringasync.weights.manifest import published_files

ORIGIN_FILE = "ringasync.json"
_NAME = re.compile(r"v(\d{6,})")


@dataclass(frozen=True, slots=True)
class Origin:
    """What exported weights are: those after ``learner_step`` batches.

    ``policy_version`` is 0 for a checkpoint whose weights were not published.
    """

    run: str
    policy_version: int
    learner_step: int


def export_name(policy_version: int) -> str:
    """Name of an export's folder in ``runs/NAME/exports``."""
    return f"v{policy_version:06d}"


def list_exports(root: Path) -> list[tuple[int, Path]]:
    """(policy version, folder) of every whole export, oldest first."""
    if not root.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def fill_export(source: Path, target: Path, origin: Origin, *, link: bool) -> None:
    """Bring the published files of ``source`` into the folder ``target``, on disk when it returns.

    ``link`` makes hard links of weight files where the file system can; the others are copied, so
    that they can be edited in one place without changing the other.

    Raises ``ManifestError`` when ``source`` is no HF-format folder, ``OSError`` on a full disk.
    """
    for path in published_files(source):
        if path.name == ORIGIN_FILE:
            continue
        linked = False
        if link and path.suffix == ".safetensors":
            with suppress(OSError):  # another file system, or one without links
                os.link(path, target / path.name)
                linked = True
        if not linked:
            shutil.copyfile(path, target / path.name)
            sync_path(target / path.name)
    write_origin(target, origin)
    sync_path(target)


def write_origin(folder: Path, origin: Origin) -> None:
    """Say in the folder what its weights are."""
    text = json.dumps(asdict(origin), indent=2) + "\n"
    (folder / ORIGIN_FILE).write_text(text, encoding="utf-8")
    sync_path(folder / ORIGIN_FILE)


def read_origin(folder: Path) -> Origin:
    """What ``write_origin`` wrote. Raises ``ManifestError`` when that cannot be read."""
    try:
        fields = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
        return Origin(
            str(fields["run"]), int(fields["policy_version"]), int(fields["learner_step"])
        )
    except (OSError, *MALFORMED_JSON) as error:
        raise ManifestError(f"{folder / ORIGIN_FILE} is unreadable: {error}") from error
