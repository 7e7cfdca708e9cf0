"""A disk that is full in earnest."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import asyncpg
import pytest

from tests.builders import add_service
from tests.e2e.harness import until_statuses, worker
from tests.faults import invariant
from tests.faults.postgres import Postgres
from tests.faults.provider import Provider
from tests.faults.texts import add_numbered


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 160 MiB; needs the right to mount one."""
    with tempfile.TemporaryDirectory(prefix="dispatcher-disk-") as directory:
        if (
            sys.platform != "linux"
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=160m", "none", directory],
                check=False,
                capture_output=True,
            ).returncode
        ):
            pytest.skip("this user may not mount a file system")
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
async def small_server(small_disk: Path) -> AsyncIterator[Postgres]:
    """A server on it."""
    server = Postgres(small_disk / "data")
    await server.open()
    yield server
    server.close()


def _fill(disk: Path) -> Path:
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    return filler


@pytest.mark.faults
@pytest.mark.timeout(300)
async def test_disk_full(small_disk: Path, small_server: Postgres) -> None:
    """A disk that fills up under load costs no answer and sends nothing twice."""
    async with small_server.database() as name, Provider(latency=0.02) as provider:
        async with small_server.connection(name) as connection:
            await add_service(connection)
            await add_numbered(connection, 3000)
        async with worker(small_server.dsn(name), provider.url, lease=2) as running:
            await provider.came(100)
            filler = _fill(small_disk)
            # A worker that cannot write sends what it holds and no more.
            await running.event("database.lost", within=90)
            await asyncio.sleep(4)
            filler.unlink()
            # A server that could not write its log has crashed, and may have failed to recover.
            with suppress(asyncpg.PostgresError, OSError):
                await small_server.start()
            async with small_server.connection(name) as connection:
                await until_statuses(connection, within=90, accepted=3000)
                assert await running.stop() == 0
                await invariant.hold(connection, provider, running)
