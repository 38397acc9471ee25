"""The chart through Helm itself (as a library), and against the schemas of Kubernetes and KEDA.

Needs the extra ``dev``; without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .manifests import CHART, MANIFESTS, ROOT, Manifest, named, parsed, pods, shipped

helm = pytest.importorskip("helm_python", reason="no helm: pip install 'ringasync[dev]'")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

KUBERNETES = ("1.28", "1.37")
EXTERNAL = {"redis": {"enabled": False, "externalUrl": "rediss://redis.example:6380/0"}}
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "external-redis": EXTERNAL,
    "own-secret": {"redis": {"auth": {"password": 'with "quotes"'}}},
    "no-keda": {"worker": {"keda": {"enabled": False}}},
    "bare": {
        "networkPolicy": {"enabled": False},
        "storage": {"existingClaim": "mine"},
        "worker": {"tolerations": [], "nodeSelector": {"pool": "spot"}},
        "learner": {"livenessProbe": {"exec": {"command": ["true"]}}},
    },
}

Render = Callable[..., dict[str, str]]


@pytest.fixture(scope="module")
def render() -> Render:
    spec = importlib.util.spec_from_file_location("deploy_render", ROOT / "deploy" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    made: Render = module.render
    return made


def documents(files: dict[str, str]) -> list[Manifest]:
    return [each for text in files.values() for each in parsed(text)]


def is_official(manifest: Manifest) -> bool:
    group = manifest["apiVersion"].partition("/")[0]
    return "." not in group or group.endswith(".k8s.io") or group == "policy"


def test_chart_has_no_lint() -> None:
    report = helm.lint(str(CHART), strict=True)
    assert report["errors"] == []
    assert [m for m in report["messages"] if m["error"] != "icon is recommended"] == []


def test_shipped_manifests_are_the_chart_rendered(render: Render) -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in MANIFESTS.glob("*.yaml")}
    assert on_disk == render(), "run `make manifests`"


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("case", VALUES)
def test_every_object_fits_the_schema_of_kubernetes(
    render: Render, case: str, version: str
) -> None:
    official = [each for each in documents(render(VALUES[case])) if is_official(each)]
    assert len(official) >= 6
    for each in official:
        kubernetes_validate.validate(each, version, strict=True)


def test_schema_check_can_fail() -> None:
    worker = named("Deployment", "worker", shipped())
    worker["spec"]["template"]["spec"]["terminationGracePeriodSecond"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        kubernetes_validate.validate(worker, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("case", ["defaults", "external-redis"])
def test_scaling_fits_the_schema_of_keda(render: Render, case: str) -> None:
    """Read by models made from KEDA's CRDs and written again: what they do not know is lost."""
    keda = pytest.importorskip("cloudcoil.models.keda.v1alpha1")
    ours = [each for each in documents(render(VALUES[case])) if not is_official(each)]
    assert sorted(each["kind"] for each in ours) == ["ScaledObject", "TriggerAuthentication"]
    for each in ours:
        model = getattr(keda, each["kind"]).model_validate(each)
        written = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert written == each


def test_external_redis_is_used_everywhere(render: Render) -> None:
    made = documents(render(EXTERNAL))
    assert "redis" not in pods(made)
    for pod in pods(made).values():
        [container] = pod["spec"]["containers"]
        assert "--redis-url=rediss://redis.example:6380/0" in container["args"]
    for trigger in named("ScaledObject", "worker", made)["spec"]["triggers"]:
        assert trigger["metadata"]["address"] == "redis.example:6380"
        assert trigger["metadata"]["enableTLS"] == "true"


def test_grace_follows_the_drain(render: Render) -> None:
    made = documents(render({"worker": {"drainTimeoutSeconds": 100}}))
    worker = named("Deployment", "worker", made)["spec"]["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] == 115
    for pod in pods(made).values():
        [container] = pod["spec"]["containers"]
        assert "args" not in container or "--set=worker.drain_timeout_s=100" in container["args"]


def test_password_of_the_values_becomes_the_secret(render: Render) -> None:
    [secret] = [e for e in documents(render(VALUES["own-secret"])) if e["kind"] == "Secret"]
    assert secret["stringData"] == {"password": 'with "quotes"'}


@pytest.mark.parametrize(
    ("values", "named_in_message"),
    [({"redis": {"enabled": False}}, "redis.externalUrl"), ({"model": ""}, "model: a hub name")],
)
def test_missing_values_are_named(
    render: Render, values: dict[str, Any], named_in_message: str
) -> None:
    with pytest.raises(helm.HelmError, match=named_in_message):
        render(values)


def test_rendering_leaves_the_chart_alone() -> None:
    assert {path.name for path in Path(CHART).iterdir()} == {
        "Chart.yaml",
        "templates",
        "values.yaml",
    }
