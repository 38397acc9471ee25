"""The chart through Helm itself (as a library); without the extra ``dev`` what imports this is
skipped."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import pytest

from .manifests import ROOT, Manifest, parsed

helm = pytest.importorskip("helm_python", reason="no helm: pip install 'ringasync[dev]'")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

KUBERNETES = ("1.28", "1.37")
Render = Callable[..., dict[str, str]]


def load_render() -> Render:
    """``render`` of ``deploy/render.py``, which is no package."""
    spec = importlib.util.spec_from_file_location("deploy_render", ROOT / "deploy" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    made: Render = module.render
    return made


def documents(files: dict[str, str]) -> list[Manifest]:
    """All that was rendered."""
    return [each for text in files.values() for each in parsed(text)]
