"""What nobody foresaw ends the process, so that a supervisor starts it again."""

from __future__ import annotations

import pytest

from tests.e2e.harness import wait_for
from tests.faults import invariant
from tests.faults.conftest import Scene
from tests.faults.texts import add_numbered


@pytest.mark.parametrize(
    ("broken", "mended"),
    [
        pytest.param(
            "ALTER TABLE attempt RENAME reply TO x",
            "ALTER TABLE attempt RENAME x TO reply",
            id="record",
        ),
        pytest.param(
            "ALTER TABLE outbox RENAME failures TO x",
            "ALTER TABLE outbox RENAME x TO failures",
            id="claim",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            "ALTER TABLE worker RENAME beat_at TO x",
            "ALTER TABLE worker RENAME x TO beat_at",
            id="beat",
            marks=pytest.mark.faults,
        ),
        pytest.param(
            "ALTER TABLE outbox RENAME doubts TO x",
            "ALTER TABLE outbox RENAME x TO doubts",
            id="retry",
            marks=pytest.mark.faults,
        ),
        pytest.param("DELETE FROM worker", "SELECT 1", id="deleted", marks=pytest.mark.faults),
    ],
)
async def test_broken_part(scene: Scene, broken: str, mended: str) -> None:
    """A part that fails ends the worker with a log line and code 1, and no answer is lost."""
    scene.provider.gate.clear()
    failing = await scene.worker(concurrency=5, unknown_retry_after=0)
    await add_numbered(scene.connection, 10)
    await scene.provider.came(5)
    await scene.connection.execute(broken)
    await add_numbered(scene.connection, 1, first=11)
    scene.provider.gate.set()
    assert await failing.exited() == 1
    await failing.event("worker.failed")
    assert failing.errors == ""
    await scene.connection.execute(mended)
    heir = await scene.worker(data_dir=failing.folder)

    async def settled() -> bool:
        waits = "SELECT count(*) FROM outbox WHERE status IN ('pending', 'sending')"
        return bool(await scene.connection.fetchval(waits) == 0)

    await wait_for(settled, "all are seen to")
    assert await heir.stop() == 0
    found = await invariant.hold(scene.connection, scene.provider, failing, heir)
    # A worker that can record nothing can give nothing back: what it had claimed is in doubt.
    assert found["accepted"] == len(scene.provider.entries)
    assert found["unknown"] == 11 - found["accepted"] <= 5
