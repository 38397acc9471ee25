"""No process of an engine outlives the worker that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.vllm.kit import engine_processes, make_engine
from tests.vllm.models import write_dense

pytestmark = pytest.mark.timeout(300)

_HOLD_AN_ENGINE = """
import asyncio, sys
from pathlib import Path
from tests.vllm.kit import make_engine

async def main():
    engine = make_engine()
    await engine.start(Path(sys.argv[1]), 1)
    print("serving", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_killed_worker_takes_its_engine_with_it(tmp_path: Path) -> None:
    folder = write_dense(tmp_path / "w", seed=0, tied=False)
    script = tmp_path / "hold.py"
    script.write_text(_HOLD_AN_ENGINE)
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        start_new_session=True,  # so that no terminal's signal does the work
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "serving":
                break
        children = engine_processes(process.pid)
        assert children, "the engine has no process of its own"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        began_s = time.monotonic()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert alive == []
        print(f"{len(children)} processes ended {time.monotonic() - began_s:.2f} s after the kill")
    finally:
        process.kill()


async def test_a_stopped_engine_ends_by_itself(tmp_path: Path) -> None:
    """vLLM kills what has not ended after five seconds, which every stop would wait for."""
    engine = make_engine()
    await engine.start(write_dense(tmp_path / "w", seed=0, tied=False), 1)
    assert engine._engine is not None
    processes = engine._engine.engine_core.resources.engine_manager.processes
    await engine.stop()
    assert [process.exitcode for process in processes] == [0]
