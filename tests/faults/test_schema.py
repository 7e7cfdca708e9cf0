"""Programs and schemas of different ages."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.e2e.harness import ROOT, until_statuses, worker
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.postgres import Postgres
from tests.faults.texts import add_numbered


async def _migrate(dsn: str, folder: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of `dispatcher migrate`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", "migrate", *options),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
        env={"DATABASE_URL": dsn, "PYTHONPATH": str(ROOT)},
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_four_migrations_at_once(server: Postgres, tmp_path: Path) -> None:
    """Four that migrate an empty database at once take turns, and all succeed."""
    async with server.database(empty=True) as name:
        told = await asyncio.gather(*(_migrate(server.dsn(name), tmp_path) for _ in range(4)))
        checked = await _migrate(server.dsn(name), tmp_path, "--check")

    assert [code for code, _ in told] == [0] * 4, told
    assert sum("from revision none" in output for _, output in told) == 1
    assert checked[0] == 0


async def test_old_worker_and_new_schema(scene: Scene) -> None:
    """A worker that runs goes on over a migration that leaves its columns; none of old starts."""
    running = await scene.worker()
    await add_numbered(scene.connection, 10)
    await until_statuses(scene.connection, accepted=10)
    await scene.connection.execute(
        "ALTER TABLE outbox ADD COLUMN colour text; UPDATE alembic_version SET version_num = '9999'"
    )
    await add_numbered(scene.connection, 10, first=11)
    await until_statuses(scene.connection, accepted=20)
    async with worker(scene.proxy.dsn(scene.database), scene.provider.url) as old:
        assert await old.exited() == 1

    assert "9999" in old.errors
    assert len(old.errors.splitlines()) == 1
    assert await running.stop() == 0
    await invariant.hold(scene.connection, scene.provider, running)
