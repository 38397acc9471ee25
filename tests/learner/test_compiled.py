"""torch.compile after a kill that left a library cut off, and on a machine without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(300)

_STEP = """
import torch
from learner.backends.compiled import compilation_explained, compiled_program

x = torch.ones(100, requires_grad=True)
with compilation_explained():
    y = compiled_program(lambda x: (x.sin() * 2 + x.cos()).sum())(x)
    print("forward", round(float(y.detach()), 3), flush=True)
    y.backward()
print("backward", round(float(x.grad[0]), 3))
"""


def _step(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", _STEP], capture_output=True, text=True, env={**os.environ, **own}
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_library_cut_off_by_a_kill_is_built_again(tmp_path: Path) -> None:
    """That of a forward at once; that of a backward by the start that follows the failure."""
    whole = _step(tmp_path)
    assert whole.returncode == 0, whole.stderr
    libraries = list(tmp_path.rglob("*.main.so"))
    assert len(libraries) == 2
    for library in libraries:
        library.write_bytes(b"")
    failed = _step(tmp_path)
    assert failed.stdout.count("removed a library that a killed process left") == 2
    assert "forward" in failed.stdout
    assert "backward" not in failed.stdout
    assert failed.returncode == 1
    assert "file too short" in failed.stderr.splitlines()[-1]
    resumed = _step(tmp_path)
    assert (resumed.returncode, resumed.stdout) == (0, whole.stdout)


def test_without_a_compiler_the_error_names_the_remedy(tmp_path: Path) -> None:
    failed = _step(tmp_path, CXX="/nonexistent")
    error = failed.stderr.splitlines()[-1]
    assert error.startswith("ringasync.errors.EnvironmentRefusedError: torch cannot compile")
    assert "No working C++ compiler" in error
    assert "learner.compile = false" in error
    assert str(tmp_path) in error
