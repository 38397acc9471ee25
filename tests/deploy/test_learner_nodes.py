"""A learner on several nodes as the chart writes it: a LeaderWorkerSet that fits the operator's
schema, with what `learner/nodes.py` reads."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from string import Template
from typing import Any

import jsonschema
import pytest

from learner.nodes import Nodes

from .chart import KUBERNETES, Render, documents, helm, kubernetes_validate
from .manifests import Manifest, named, pods

SCHEMA = json.loads((Path(__file__).parent / "leaderworkerset.schema.json").read_text())
BRACES = str.maketrans("()", "{}")
"""Kubernetes' ``$(NAME)`` -> ``${NAME}``."""
FOUR_NODES: dict[str, Any] = {
    "learner": {
        "nodes": 4,
        "ranksPerNode": 8,
        "resources": {
            "requests": {"nvidia.com/gpu": 8},
            "limits": {"nvidia.com/gpu": 8, "memory": "512Gi"},
        },
    }
}


@pytest.fixture
def made(render: Render) -> list[Manifest]:
    return documents(render(FOUR_NODES))


def check(learner: Manifest, version: str) -> None:
    """Raise what speaks against it: the operator's fields, then its pod templates by Kubernetes."""
    jsonschema.Draft202012Validator(SCHEMA).validate(learner)
    for name in ("leaderTemplate", "workerTemplate"):
        template = learner["spec"]["leaderWorkerTemplate"][name]
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": template}
        kubernetes_validate.validate(whole, version, strict=True)


def templates(manifests: list[Manifest]) -> list[Manifest]:
    """Node 0's pod and that of the others."""
    group = named("LeaderWorkerSet", "learner", manifests)["spec"]["leaderWorkerTemplate"]
    return [group["leaderTemplate"], group["workerTemplate"]]


def container(template: Manifest) -> Manifest:
    [only] = template["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("version", KUBERNETES)
def test_it_fits_the_schema_of_the_operator(made: list[Manifest], version: str) -> None:
    check(named("LeaderWorkerSet", "learner", made), version)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "size"), 4, "'size' was unexpected"),
        (("spec", "leaderWorkerTemplate", "restartPolicy"), "Always", "'Always' is not one of"),
        (("spec", "leaderWorkerTemplate", "size"), "4", "'4' is not of type 'integer'"),
        (("spec", "networkConfig"), {}, "'subdomainPolicy' is a required property"),
        (
            ("spec", "leaderWorkerTemplate", "workerTemplate", "spec", "hostNetworks"),
            True,
            "'hostNetworks' was unexpected",
        ),
    ],
)
def test_a_bad_field_would_be_noticed(
    made: list[Manifest], path: tuple[str, ...], value: object, message: str
) -> None:
    learner = deepcopy(named("LeaderWorkerSet", "learner", made))
    inner = learner
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError, match=re.escape(message)):
        check(learner, KUBERNETES[0])


def test_every_node_finds_its_place(made: list[Manifest]) -> None:
    """The operator puts its variables in front of a container's own, which may so refer to them."""
    size = named("LeaderWorkerSet", "learner", made)["spec"]["leaderWorkerTemplate"]["size"]
    for index, template in ((0, templates(made)[0]), (3, templates(made)[1])):
        given = {
            "LWS_LEADER_ADDRESS": "ringasync-learner-0.ringasync-learner.ringasync",
            "LWS_GROUP_SIZE": str(size),
            "LWS_WORKER_INDEX": str(index),
        }
        environment = {
            each["name"]: Template(each.get("value", "").translate(BRACES)).substitute(given)
            for each in container(template)["env"]
        }
        place = Nodes.of(environment)
        assert place == Nodes(4, index, given["LWS_LEADER_ADDRESS"], 29400)
        assert "--set=learner.ranks=32" in container(template)["args"]
        assert place.ranks_here(32) == container(template)["resources"]["limits"]["nvidia.com/gpu"]
        assert environment["NCCL_SOCKET_IFNAME"] == environment["GLOO_SOCKET_IFNAME"] == "eth0"


def test_all_nodes_share_the_run_and_only_rank_0s_is_probed(made: list[Manifest]) -> None:
    leader, follower = (deepcopy(container(each)) for each in templates(made))
    mounts = {each["mountPath"] for each in leader["volumeMounts"]}
    assert {"/runs", "/dev/shm"} <= mounts  # noqa: S108
    for name in ("startupProbe", "livenessProbe", "readinessProbe", "ports"):
        assert name not in follower
        leader.pop(name)
    assert leader == follower
    assert named("PersistentVolumeClaim", "runs", made)["spec"]["accessModes"] == ["ReadWriteMany"]


def test_there_is_one_learner_and_its_nodes_may_talk(made: list[Manifest]) -> None:
    kinds = [e["kind"] for e in made if e["metadata"]["name"] == "ringasync-learner"]
    assert sorted(kinds) == ["LeaderWorkerSet", "NetworkPolicy"]
    policy = named("NetworkPolicy", "learner", made)["spec"]
    selector = policy["podSelector"]
    assert selector["matchLabels"].items() <= pods(made)["learner"]["metadata"]["labels"].items()
    assert policy["ingress"] == [{"from": [{"podSelector": selector}]}]
    assert policy["egress"] == [{"to": [{"podSelector": selector}]}]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learner": {"nodes": 2, "ranksPerNode": 8}}, "learner.ranksPerNode is 8, but"),
        (
            {"learner": {"nodes": 2}, "storage": {"accessModes": ["ReadWriteOnce"]}},
            "storage.accessModes lacks ReadWriteMany",
        ),
    ],
)
def test_what_cannot_work_is_refused(render: Render, values: Any, message: str) -> None:
    with pytest.raises(helm.HelmError, match=message):
        render(values)
