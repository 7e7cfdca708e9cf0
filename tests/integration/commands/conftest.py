"""Commands as people type them: in this process for breadth, as real processes where it matters."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from typer.testing import CliRunner

from dispatcher.cli import app
from tests.integration.peers import Connection


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document that it printed."""
        return json.loads(self.out)


Command: TypeAlias = Callable[..., Coroutine[Any, Any, Outcome]]


async def rows(connection: Connection, query: str, *args: object) -> list[tuple[Any, ...]]:
    """What a query finds, as plain tuples."""
    return [tuple(row) for row in await connection.fetch(query, *args)]


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Sets nothing at all, in a folder of the test's own, which it returns."""
    for name in os.environ:
        if name.startswith("DISPATCHER_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def settings(no_settings: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets nothing but the test's database, in a folder of the test's own, which it returns."""
    monkeypatch.setenv("DATABASE_URL", database)
    return no_settings


@pytest.fixture
def offline(no_settings: Path) -> Command:
    """Runs a command in this process, without a database."""
    return _run_here


@pytest.fixture
def command(settings: Path) -> Command:
    """Runs a command in this process; an error that nobody foresaw fails the test."""
    return _run_here


async def _run_here(*arguments: object) -> Outcome:
    result = await asyncio.to_thread(
        CliRunner().invoke,
        app,
        [str(argument) for argument in arguments],
        catch_exceptions=False,
        prog_name="dispatcher",
    )
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def process(settings: Path) -> Command:
    """Runs a command as a process of its own; other settings are given by their names."""

    async def run(*arguments: object, **environment: str) -> Outcome:
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dispatcher", *map(str, arguments)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), **environment},
        )
        out, err = await running.communicate()
        return Outcome(running.returncode or 0, out.decode(), err.decode())

    return run
