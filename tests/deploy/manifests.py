"""The rendered manifests as data, for the tests beside this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "ringasync"
MANIFESTS = ROOT / "deploy" / "manifests"
ROLES = ("coordinator", "learner", "grader", "worker")

Manifest = dict[str, Any]


def parsed(text: str) -> list[Manifest]:
    """All documents of a YAML file that are not empty."""
    return [each for each in yaml.safe_load_all(text) if each is not None]


def shipped() -> list[Manifest]:
    """All documents of ``deploy/manifests``."""
    return [each for path in sorted(MANIFESTS.glob("*.yaml")) for each in parsed(path.read_text())]


def named(kind: str, suffix: str, manifests: list[Manifest]) -> Manifest:
    """The one manifest of this kind whose name ends so."""
    [found] = [
        each
        for each in manifests
        if each["kind"] == kind and each["metadata"]["name"].endswith(f"-{suffix}")
    ]
    return found


def pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Pod templates by component; of a learner on several nodes that of node 0."""
    templates = [
        template
        for each in manifests
        for spec in [each.get("spec", {})]
        for template in [
            spec.get("template") or spec.get("leaderWorkerTemplate", {}).get("leaderTemplate")
        ]
        if template
    ]
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in templates}
