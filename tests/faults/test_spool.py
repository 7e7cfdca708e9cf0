"""Answers that a worker has when it must stop and the database is away."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime, timedelta
from pathlib import Path
from signal import SIGTERM

import pytest

from tests.e2e.harness import Worker, until_statuses
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered


async def _stopped_without_database(scene: Scene, signals: int = 1) -> Worker:
    """A worker that got ten answers while the database was away, and was told to stop."""
    scene.provider.gate.clear()
    await add_numbered(scene.connection, 10)
    stopped = await scene.worker(concurrency=10, drain=2)
    await scene.provider.came(10)
    scene.proxy.shut()
    await stopped.event("database.lost")
    scene.provider.gate.set()
    await scene.provider.all_closed()
    for _ in range(signals):
        stopped.signal(SIGTERM)
        await stopped.event("worker.stopping")
    assert await stopped.exited() == signals - 1
    await scene.proxy.listen()
    return stopped


def _spooled(worker: Worker) -> Path:
    (path,) = (worker.folder / "spool").iterdir()
    return path


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.faults)])
async def test_taken_up(scene: Scene, signals: int) -> None:
    """Answers that could not be written are spooled, and the next start records them once."""
    stopped = await _stopped_without_database(scene, signals)
    assert len(_spooled(stopped).read_text().splitlines()) == 10
    heirs = await asyncio.gather(
        *(scene.worker(data_dir=stopped.folder, http_port=0) for _ in range(3))
    )
    await until_statuses(scene.connection, accepted=10)

    assert not list((stopped.folder / "spool").iterdir())
    for heir in heirs:
        assert await heir.stop() == 0
    await invariant.hold(scene.connection, scene.provider, stopped, *heirs)


@pytest.mark.faults
async def test_frozen_link(scene: Scene) -> None:
    """A worker told to stop while nothing passes to the database spools when its time is over."""
    scene.provider.gate.clear()
    await add_numbered(scene.connection, 10)
    # With so long a lease a statement is waited for 10 seconds: a claim, and then the record.
    stopped = await scene.worker(concurrency=10, drain=2, lease=60)
    await scene.provider.came(10)
    scene.proxy.freeze()
    scene.provider.gate.set()
    await scene.provider.all_closed()
    assert await stopped.stop() == 0
    assert len(_spooled(stopped).read_text().splitlines()) == 10
    told, spooled = [
        datetime.fromisoformat((await stopped.event(name))["timestamp"])
        for name in ("worker.stopping", "spool.written")
    ]
    assert spooled - told < timedelta(seconds=8), "it waited for a statement"
    scene.proxy.thaw()
    heir = await scene.worker(data_dir=stopped.folder)
    await until_statuses(scene.connection, accepted=10)

    assert await heir.stop() == 0
    await invariant.hold(scene.connection, scene.provider, stopped, heir)


@pytest.mark.faults
async def test_torn_and_of_another_version(scene: Scene) -> None:
    """A last line that was torn costs only itself, and fields we do not know cost nothing."""
    stopped = await _stopped_without_database(scene)
    path = _spooled(stopped)
    lines = path.read_text().splitlines()
    newer = [json.dumps({"colour": "blue", **json.loads(line)}) for line in lines[:-1]]
    path.write_text("\n".join([*newer, lines[-1][:40]]))
    heir = await scene.worker(data_dir=stopped.folder, lease=1)
    await until_statuses(scene.connection, accepted=9, unknown=1)

    assert heir.seen("spool.torn", line=10)
    assert [path.suffix for path in (stopped.folder / "spool").iterdir()] == [".torn"]
    assert await heir.stop() == 0
    await invariant.hold(scene.connection, scene.provider, stopped, heir)
