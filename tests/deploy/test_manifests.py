"""What the shipped manifests promise: one configuration for all roles, drains that have the time
they need, the right streams, pods that may do little, and a Redis that starts as written there."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import redis

from learner.nodes import START_TIMEOUT_S
from ringasync.broker.connection import check_server
from ringasync.broker.embedded import find_redis_server
from ringasync.broker.keys import Keys
from ringasync.config.load import config_hash, load_config
from ringasync.config.schema import Config
from ringasync.observability.exporter import ports_of
from ringasync.runtime.roles import LEARNER_DRAIN_TIMEOUT_S

from .manifests import ROLES, Manifest, named, parsed, pods, shipped

MANIFESTS = shipped()
PODS = pods(MANIFESTS)


def container(role: str) -> Manifest:
    [only] = PODS[role]["spec"]["containers"]
    return dict(only)


@pytest.fixture
def configs(tmp_path: Path) -> dict[str, Config]:
    """What each role loads from the ConfigMap and its arguments."""
    path = tmp_path / "run.toml"
    path.write_text(named("ConfigMap", "config", MANIFESTS)["data"]["run.toml"])
    found = {}
    for role in ROLES:
        values = [arg.removeprefix("--set=") for arg in container(role)["args"] if "--set=" in arg]
        found[role] = load_config(path, values)
    return found


def test_all_roles_agree_on_a_valid_configuration(configs: dict[str, Config]) -> None:
    assert len({config_hash(config) for config in configs.values()}) == 1
    for role in ROLES:
        assert container(role)["command"] == ["ringasync", role]
        assert f"--model={configs[role].model.path}" in container(role)["args"]
        assert str(configs[role].run.dir) in {
            mount["mountPath"] for mount in container(role)["volumeMounts"]
        }


def test_grace_period_is_longer_than_the_drain(configs: dict[str, Config]) -> None:
    grace_s = {role: PODS[role]["spec"]["terminationGracePeriodSeconds"] for role in ROLES}
    assert grace_s["worker"] >= configs["worker"].worker.drain_timeout_s + 10
    assert grace_s["learner"] >= LEARNER_DRAIN_TIMEOUT_S + 10


def test_workers_are_scaled_by_the_streams_they_take_from(configs: dict[str, Config]) -> None:
    keys = Keys(configs["worker"].run.name)
    scaled = named("ScaledObject", "worker", MANIFESTS)["spec"]
    streams = [trigger["metadata"]["stream"] for trigger in scaled["triggers"]]
    assert streams == [keys.tickets, keys.tickets_resume]
    # KEDA's manual: only a group's lag scales to nothing; with a length one must stay.
    assert scaled["minReplicaCount"] >= 1
    worker = named("Deployment", "worker", MANIFESTS)
    assert scaled["scaleTargetRef"]["name"] == worker["metadata"]["name"]
    assert "replicas" not in worker["spec"], "KEDA and the manifest would overrule each other"


@pytest.mark.parametrize("role", ROLES)
def test_probes_ask_what_the_role_serves(role: str, configs: dict[str, Config]) -> None:
    """And none of them asks Redis: a pod is not killed because that is away."""
    only, metrics = container(role), configs[role].metrics
    assert only["ports"] == [{"name": "metrics", "containerPort": ports_of(metrics, role)[0]}]
    assert metrics.host == "0.0.0.0"  # noqa: S104  the kubelet asks the pod's address
    asked = {name: only[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in asked.items()} == {
        "startup": "/livez",
        "liveness": "/livez",
        "readiness": "/healthz",
    }
    assert {probe["port"] for probe in asked.values()} == {"metrics"}
    startup = only["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > START_TIMEOUT_S


@pytest.mark.parametrize("role", [*ROLES, "redis"])
def test_pods_may_do_little(role: str) -> None:
    spec = PODS[role]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    limits = container(role)["securityContext"]
    assert limits["readOnlyRootFilesystem"] is True
    assert limits["allowPrivilegeEscalation"] is False
    assert limits["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= set(container(role)["resources"]["requests"])
    assert "memory" in container(role)["resources"]["limits"]


@pytest.mark.parametrize("role", ["coordinator", "learner"])
def test_a_drained_role_is_started_again(role: str) -> None:
    """A drain ends with exit code 0, which a Job would take for the end of the run."""
    controller = named("StatefulSet", role, MANIFESTS)["spec"]
    assert controller["replicas"] == 1
    assert controller["template"]["spec"]["restartPolicy"] == "Always"


def test_password_comes_from_the_secret_alone() -> None:
    assert [each for each in MANIFESTS if each["kind"] == "Secret"] == []
    for role in ROLES:
        [entry] = [e for e in container(role)["env"] if e["name"] == "RINGASYNC_REDIS_PASSWORD"]
        assert entry["valueFrom"]["secretKeyRef"]["key"] == "password"


def test_selectors_find_their_pods() -> None:
    labels = [pod["metadata"]["labels"].items() for pod in PODS.values()]
    for each in MANIFESTS:
        selector = each.get("spec", {}).get("selector") or each.get("spec", {}).get("podSelector")
        if selector:
            wanted = selector.get("matchLabels", selector)
            assert any(wanted.items() <= found for found in labels), each["metadata"]["name"]


def test_redis_starts_as_the_manifest_says_and_bears_the_broker(tmp_path: Path) -> None:
    """The container's own command and probe, with folders and port of this test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def here(text: str) -> str:
        local = text.replace("/tmp", str(tmp_path)).replace("--dir /data", f"--dir {tmp_path}/data")  # noqa: S108
        return local.replace("6379", str(port))

    (tmp_path / "data").mkdir()
    spec = container("redis")
    command = [here(part) if i == 2 else part for i, part in enumerate(spec["command"])]
    folder = find_redis_server().parent
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "REDISCLI_AUTH": "a secret"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        probe = [here(part) for part in spec["readinessProbe"]["exec"]["command"]]
        deadline = time.monotonic() + 30
        while subprocess.run(probe, env=environment, stderr=subprocess.DEVNULL).returncode:
            assert process.poll() is None, "Redis ended"
            assert time.monotonic() < deadline, "the probe never succeeded"
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
        with redis.Redis(port=port, password="a secret", decode_responses=True) as client:
            check_server("here", client.info("server"), client.info("memory"), {"role": "master"})
            assert client.info("persistence")["aof_enabled"] == 1
        command_line = Path(f"/proc/{process.pid}/cmdline").read_text()
        assert "a secret" not in command_line
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "sh did not become redis-server"


def test_empty_documents_are_left_out() -> None:
    assert parsed("a: 1\n---\n# nothing\n---\nb: 2") == [{"a": 1}, {"b": 2}]
