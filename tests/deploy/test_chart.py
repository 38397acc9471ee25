"""The chart through Helm itself (as a library), and against the schemas of Kubernetes and KEDA.

Needs the extra ``dev``; without it these tests are skipped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .chart import KUBERNETES, Render, documents, helm, kubernetes_validate
from .manifests import CHART, MANIFESTS, Manifest, named, pods, shipped

EXTERNAL = {"redis": {"enabled": False, "externalUrl": "rediss://redis.example:6380/0"}}
SENTINELS = "redis+sentinel://s1:26379,s2:26379/mymaster?db=2"
CLUSTER = "rediss+cluster://n1:6379,n2:6379"


def external(url: str) -> dict[str, Any]:
    return {"redis": {"enabled": False, "externalUrl": url}}


VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "external-redis": EXTERNAL,
    "sentinels": external(SENTINELS),
    "cluster": external(CLUSTER),
    "own-secret": {"redis": {"auth": {"password": 'with "quotes"'}}},
    "no-keda": {"worker": {"keda": {"enabled": False}}},
    "learner-nodes": {"learner": {"nodes": 2}, "networkPolicy": {"metricsNamespace": "monitoring"}},
    "no-metrics": {"metrics": {"port": 0}},
    "bare": {
        "networkPolicy": {"enabled": False},
        "storage": {"existingClaim": "mine"},
        "worker": {"tolerations": [], "nodeSelector": {"pool": "spot"}},
        "learner": {"livenessProbe": {"exec": {"command": ["true"]}}},
    },
}


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


@pytest.mark.parametrize("case", ["defaults", "external-redis", "sentinels", "cluster"])
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


@pytest.mark.parametrize(
    ("url", "kind", "metadata"),
    [
        (
            SENTINELS,
            "redis-sentinel-streams",
            {"addresses": "s1:26379,s2:26379", "sentinelMaster": "mymaster", "databaseIndex": "2"},
        ),
        (
            CLUSTER,
            "redis-cluster-streams",
            {"addresses": "n1:6379,n2:6379", "enableTLS": "true"},
        ),
    ],
)
def test_redis_of_several_servers_is_used_everywhere(
    render: Render, url: str, kind: str, metadata: dict[str, str]
) -> None:
    made = documents(render(external(url)))
    has_sentinels = "sentinelMaster" in metadata
    for pod in pods(made).values():
        [container] = pod["spec"]["containers"]
        assert f"--redis-url={url}" in container["args"]
        names = {each["name"] for each in container["env"]}
        assert ("RINGASYNC_SENTINEL_PASSWORD" in names) is has_sentinels
    for trigger in named("ScaledObject", "worker", made)["spec"]["triggers"]:
        assert trigger["type"] == kind
        ours = {"stream", "streamLength"}
        assert {k: v for k, v in trigger["metadata"].items() if k not in ours} == metadata
        assert ours < set(trigger["metadata"])
    egress = named("NetworkPolicy", "roles", made)["spec"]["egress"]
    assert ({"protocol": "TCP", "port": 26379} in egress[1]["ports"]) is has_sentinels


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
    [
        ({"redis": {"enabled": False}}, "redis.externalUrl"),
        ({"model": ""}, "model: a hub name"),
        (external("http://h"), "write redis://HOST:PORT/0"),
        (external("redis://:secret@h:6379/0"), "without user and password"),
        (external("redis+sentinel://s1:26379"), "name the Sentinels' master"),
        ({"worker": {"replica": 3}}, r"at '/worker'.*additional properties 'replica' not allowed"),
        ({"learner": {"nodes": "two"}}, r"at '/learner/nodes'.*want integer"),
        ({"redis": {"storage": "20 GB"}}, r"at '/redis/storage'.*does not match pattern"),
        ({"run": "my run"}, r"at '/run'.*does not match pattern"),
        ({"image": {"pullPolicy": "always"}}, r"at '/image/pullPolicy'.*one of"),
    ],
)
def test_missing_or_wrong_values_are_named(
    render: Render, values: dict[str, Any], named_in_message: str
) -> None:
    with pytest.raises(helm.HelmError, match=f"(?s){named_in_message}"):
        render(values)


def test_rendering_leaves_the_chart_alone() -> None:
    assert {path.name for path in Path(CHART).iterdir()} == {
        "Chart.yaml",
        "templates",
        "values.schema.json",
        "values.yaml",
    }
