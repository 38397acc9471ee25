"""How a process of vLLM's ends; needs no vLLM."""

from __future__ import annotations

import atexit
import multiprocessing
from pathlib import Path

import pytest

from workers.engines.vllm.plugin import _end_soon_after_success


def _end_of_a_process(how: str, taken_apart: Path) -> None:
    atexit.register(taken_apart.touch)  # runs after what was registered later
    _end_soon_after_success()
    if how == "fails":
        raise ValueError(how)
    if how == "leaves":
        raise SystemExit  # as vLLM's loop does
    if how == "exits":
        raise SystemExit(7)


@pytest.mark.parametrize(
    ("how", "code", "soon"),
    [("succeeds", 0, True), ("leaves", 0, True), ("fails", 1, False), ("exits", 7, False)],
)
def test_a_process_that_ends_soon_keeps_its_exit_code(
    how: str, code: int, soon: bool, tmp_path: Path
) -> None:
    taken_apart = tmp_path / "taken-apart"
    process = multiprocessing.get_context("spawn").Process(
        target=_end_of_a_process, args=(how, taken_apart)
    )
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert taken_apart.exists() is not soon
