"""``python deploy/render.py``: writes the chart's default rendering into ``deploy/manifests``.

Helm itself, as a library (``helm-python-sdk``). `tests/deploy` fails when the two differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import helm_python

HERE = Path(__file__).parent
CHART = HERE / "helm" / "ringasync"
MANIFESTS = HERE / "manifests"
HEAD = (
    "# Rendered from deploy/helm/ringasync by `make manifests`: change the chart, not this file.\n"
)
RELEASE, NAMESPACE = "ringasync", "ringasync"


def render(values: dict[str, Any] | None = None) -> dict[str, str]:
    """YAML by file name. Raises ``helm_python.HelmError`` when the chart refuses the values."""
    with helm_python.Chart.load(str(CHART)) as chart:
        rendered = chart.render(values or {}, name=RELEASE, namespace=NAMESPACE)
    files = {Path(path).name: text for path, text in rendered.items()}
    return {
        name: HEAD + text.strip("\n") + "\n"
        for name, text in files.items()
        if name.endswith(".yaml") and text.strip()
    }


if __name__ == "__main__":
    for name, text in render().items():
        (MANIFESTS / name).write_text(text, encoding="utf-8")
