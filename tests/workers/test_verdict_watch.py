"""A verifier that hangs: named while it does, and after it was killed for it."""

from __future__ import annotations

import pytest

from ringasync.errors import VerifierTimeoutError
from workers.verdict_watch import VerdictWatch

TASK = {"verifier": "python:mine:slow"}


def test_a_verdict_that_does_not_come_is_named() -> None:
    now_s = 0.0
    watch = VerdictWatch(30, lambda: now_s)
    with watch.asking("g1.0", TASK), watch.asking("g1.1", TASK):
        assert watch.stall() == ""
        now_s += 31
        text = watch.stall()
        assert text.startswith("31 s: a verdict on g1.0; owed by verifier 'python:mine:slow'; mend")
    assert watch.stall() == ""


def test_one_verdict_after_another_is_no_stall() -> None:
    now_s = 0.0
    watch = VerdictWatch(30, lambda: now_s)
    for number in range(5):
        with watch.asking(f"g{number}.0", TASK):
            assert watch.stall() == ""
            now_s += 20
            assert watch.stall() == ""


def test_a_verifier_that_was_killed_for_it_is_named_for_a_minute() -> None:
    now_s = 0.0
    watch = VerdictWatch(30, lambda: now_s)
    for _ in range(2):
        with pytest.raises(VerifierTimeoutError), watch.asking("g1.0", TASK):
            raise VerifierTimeoutError("no verdict within 10 s")
    now_s += 5
    text = watch.stall()
    assert "verifier 'python:mine:slow' on g1.0: no verdict within 10 s, killed 5 s ago" in text
    assert "(2 by now); mend the verifier" in text
    now_s += 60
    assert watch.stall() == ""
