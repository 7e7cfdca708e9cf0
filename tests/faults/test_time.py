"""The clock of the worker's machine may say what it likes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest

from tests.builders import add_service
from tests.e2e.harness import ROOT, Worker, until_statuses, wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered

WALL: Final = {
    "time.time",
    "time.time_ns",
    "time.localtime",
    "time.gmtime",
    "datetime.now",
    "datetime.utcnow",
    "datetime.today",
    "date.today",
    "datetime.datetime.now",
    "datetime.date.today",
}

ALLOWED: Final = {
    "logs.py": "the time stamp of a line",
    "demo.py": "what it shows to a person",
    "commands/check.py": "tells a person how far the clocks are apart",
    "commands/repair.py": "shows a person how long ago it was",
    "commands/why.py": "shows a person how long ago it was",
    "commands/status.py": "shows a person how long ago it was",
    "commands/moments.py": "reads what a person wrote",
}
"""Files that may ask for the wall clock, and what for."""


def _wall_clocks(path: Path) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL:
            yield f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            yield from (f"{path.name}:{node.lineno}: from time import {n.name}" for n in node.names)


def test_nobody_asks_the_wall_clock() -> None:
    """Nothing that sends, waits or counts reads the wall clock of the machine it runs on."""
    package = ROOT / "dispatcher"
    for path in package.rglob("*.py"):
        name = path.relative_to(package).as_posix()
        if name not in ALLOWED and not name.startswith("simulator/"):
            assert not list(_wall_clocks(path)), name


JUMPING: Final = """
import os, time, datetime
real, real_ns, at = time.time, time.time_ns, os.environ["JUMP"]
def offset():
    with open(at) as file:
        return int(file.read())
time.time = lambda: real() + offset()
time.time_ns = lambda: real_ns() + offset() * 10**9
"""


@pytest.mark.faults
async def test_clock_that_jumps(scene: Scene, tmp_path: Path) -> None:
    """A wall clock that jumps two hours either way shortens no lease and moves no window."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    jump = tmp_path / "jump"
    jump.write_text("0")
    await add_service(scene.connection, 43, min_delay=timedelta(milliseconds=20))
    scene.provider.latency = 0.02
    jumping = await Worker.start(
        "run",
        folder=tmp_path,
        PYTHONPATH=f"{tmp_path}:{ROOT}",
        JUMP=str(jump),
        DATABASE_URL=scene.proxy.dsn(scene.database),
        DISPATCHER_PROVIDER_URL=scene.provider.url,
        DISPATCHER_HTTP_PORT="0",
        DISPATCHER_LEASE="2",
        DISPATCHER_CONCURRENCY="5",
    )
    try:
        await jumping.started()
        other = await scene.worker(lease=2, concurrency=5)
        for number, seconds in enumerate((7200, -7200, 0)):
            first = 200 * number + 1
            await add_numbered(scene.connection, 150, first=first)
            await add_numbered(scene.connection, 50, first=first + 150, service_id=43)
            await scene.provider.came(first + 20)
            # Written whole, for the worker may read it at any moment.
            (tmp_path / "next").write_text(str(seconds))
            (tmp_path / "next").replace(jump)
            await until_statuses(scene.connection, accepted=200 * number + 200)

        async def beaten() -> bool:
            alive = "SELECT count(*) FROM worker WHERE lease_until > clock_timestamp()"
            return bool(await scene.connection.fetchval(alive) == 2)

        await wait_for(beaten, "both are alive")
        stamps = {event["timestamp"][:13] for event in jumping.seen("message.accepted")}
        assert len(stamps) >= 3, "its clock did not jump"
        assert not [e for e in jumping.events + other.events if e["event"] == "worker.rescued"]
        assert await jumping.stop() == await other.stop() == 0
        await invariant.hold(scene.connection, scene.provider, jumping, other)
        hours = await scene.connection.fetchval(
            "SELECT count(*) FROM outbox WHERE claimed_at NOT BETWEEN created_at AND now()"
        )
        assert hours == 0
    finally:
        await jumping.close()
