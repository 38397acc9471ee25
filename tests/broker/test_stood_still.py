"""A process that was stopped for longer than the retry budget asks Redis again when it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

BUDGET_S = 0.5
_CHILD = f"""
import asyncio, os, signal
from redis.exceptions import TimeoutError
from ringasync.broker.connection import SpokenRetry

tries = []

async def do():
    tries.append(1)
    if len(tries) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        raise TimeoutError("the read that was under way")
    return "answered"

async def fail(error):
    pass

print(asyncio.run(SpokenRetry({BUDGET_S}, "here").call_with_retry(do, fail)))
"""


def test_a_process_that_stood_still_does_not_take_that_for_redis_s_silence() -> None:
    """Found by the chaos suite: a worker stopped for 65 s ended the run."""
    child = subprocess.Popen([sys.executable, "-c", _CHILD], stdout=subprocess.PIPE, text=True)
    try:
        deadline_s = time.monotonic() + 60
        while psutil.Process(child.pid).status() != psutil.STATUS_STOPPED:
            assert child.poll() is None
            assert time.monotonic() < deadline_s, "it did not stop"
            time.sleep(0.01)
        time.sleep(2 * BUDGET_S)  # the time that it stands still is what is tried
        os.kill(child.pid, signal.SIGCONT)
        told, _ = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert told.splitlines()[-1] == "answered"
