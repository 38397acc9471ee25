"""The herd is real: each client pulls the whole version with the transport's own checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import elastic


@pytest.mark.slow
@pytest.mark.parametrize("where", ["file", "second redis"])
async def test_every_client_of_a_herd_pulls(where: str, tmp_path: Path) -> None:
    found = await elastic.herd(elastic.Settings(workers=2, weights_mb=1), where, tmp_path)
    assert len(found.pulls_s) == 2
    assert min(found.pulls_s) > 0
    assert found.quiet_s
    assert found.publish_during_s > 0
    assert found.publish_held_s > 0
