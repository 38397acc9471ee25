"""What the compose files and the Dockerfile promise; `make compose-test` runs them."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.main import get_group

from ringasync.cli.main import app
from ringasync.runtime.roles import ROLE_MODULES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(TEXT)["services"]
OWN = {name: service for name, service in SERVICES.items() if name != "redis"}


def test_all_roles_are_services() -> None:
    assert set(SERVICES) == {"redis", *ROLE_MODULES, "worker-gpu", "learner-gpu"}
    assert {name for name, one in SERVICES.items() if "profiles" in one} == {
        "worker-gpu",
        "learner-gpu",
    }


@pytest.mark.parametrize("name", SERVICES)
def test_service_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries"} <= set(check)


@pytest.mark.parametrize("name", OWN)
def test_health_check_asks_for_its_own_role(name: str) -> None:
    role = name.removesuffix("-gpu")
    assert SERVICES[name]["command"][0] == role
    assert SERVICES[name]["healthcheck"]["test"] == ["CMD", "ringasync", "health", role]


@pytest.mark.parametrize("name", OWN)
def test_command_parses(name: str) -> None:
    command, *arguments = SERVICES[name]["command"]
    get_group(app).commands[command].make_context(command, [*arguments])


@pytest.mark.parametrize("name", OWN)
def test_all_roles_have_the_same_configuration(name: str) -> None:
    """All but the coordinator wait for the model that it builds: not every engine waits for it."""
    *given, last = SERVICES[name]["command"][1:]
    assert given == SERVICES["coordinator"]["command"][1:-1]
    assert last == ("--prepare" if name == "coordinator" else "--wait")


@pytest.mark.parametrize("name", SERVICES)
def test_password_is_required_and_only_from_the_environment(name: str) -> None:
    variable = "REDIS_PASSWORD" if name == "redis" else "RINGASYNC_REDIS_PASSWORD"
    assert re.fullmatch(r"\$\{REDIS_PASSWORD:\?[^}]+\}", SERVICES[name]["environment"][variable])
    # As an argument or in an address it would be seen by `ps`.
    assert "${REDIS_PASSWORD" not in str(SERVICES[name]["command"])


def test_redis_keeps_everything_and_is_not_published() -> None:
    redis = SERVICES["redis"]
    script = redis["command"][-1]
    for part in ("--appendonly yes", "--maxmemory-policy noeviction", "--reuid=redis"):
        assert part in script
    assert redis["volumes"] == ["redis-data:/data"]
    assert not [name for name, service in SERVICES.items() if "ports" in service]


def test_images_are_pinned() -> None:
    bases = [
        SERVICES["redis"]["image"],
        *re.findall(r"^FROM (\S+/\S+)", DOCKERFILE, re.MULTILINE),
    ]
    assert bases
    for base in bases:
        assert re.fullmatch(r"docker\.io/library/\w+:\d[\w.-]*", base), base


def test_image_runs_as_a_user() -> None:
    stage = DOCKERFILE[DOCKERFILE.index(" AS runtime") :]
    for target in re.split(r"^FROM ", stage, flags=re.MULTILINE):
        assert re.findall(r"^USER (\S+)", target, re.MULTILINE)[-1:] in ([], ["1000:1000"])
    assert "USER 1000:1000" in stage
    for service in OWN.values():
        assert "user" not in service
        assert service["cap_drop"] == ["ALL"]


def test_image_has_the_pinned_versions() -> None:
    installs = re.findall(r"pip install .*", DOCKERFILE)
    assert len(installs) == 4
    for line in installs:
        assert "--no-deps" in line or re.search(r"-c constraints(-cuda)?\.txt", line), line
    assert (ROOT / "constraints.txt").read_text().count("\ntorch==") == 1


def test_pins_of_the_cuda_image_are_what_its_extra_allows() -> None:
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints-cuda.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["vllm"]]
    for text in wanted:
        one = Requirement(text)
        assert one.specifier.contains(pinned[canonicalize_name(one.name)]), text


def test_copied_paths_reach_the_build() -> None:
    kept = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)", DOCKERFILE, re.MULTILINE):
        copied.update(line.split()[:-1])
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


def test_development_file_mounts_what_exists() -> None:
    dev = yaml.safe_load((ROOT / "docker-compose.dev.yml").read_text(encoding="utf-8"))
    for name, service in dev["services"].items():
        assert name in SERVICES
        for mount in service["volumes"]:
            source, target, mode = mount.split(":")
            assert (ROOT / source).is_dir()
            assert target.startswith("/")
            assert mode == "ro"


def test_no_secret_is_committed() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", ".env", "*/.env"], cwd=ROOT, capture_output=True, text=True
    )
    assert tracked.returncode == 0
    assert tracked.stdout == ""
    assert re.search(r"^\.env$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
