"""The benchmarks do what they say, on numbers too small to measure anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import database, report
from bench.cases import growth
from bench.contenders.task import SERVICE, USER
from bench.race import Contender, race

OURS = ("dispatcher", "aiohttp_plain", "aiohttp_tuned", "loop", "raw")
"""All that need no library but the dispatcher's own."""


async def test_every_contender_sends_all_its_messages() -> None:
    """A race ends with as many requests as messages, and with what they took."""
    async with database.running() as server:
        for name in OURS:
            contender = Contender(name)
            result = await race(server, contender, 300)
            assert result.rate > 0
            assert result.memory > 0
            assert (result.transactions is None) == (contender.recorded is None)


async def test_statements_that_are_timed_are_those_of_a_worker() -> None:
    """A backlog is claimed and recorded to its end by the statements of the growth case."""
    async with (
        database.running() as server,
        server.database(migrated=True) as name,
        server.connection(name) as connection,
    ):
        await connection.execute(growth.SERVICES, SERVICE, USER, 0)
        await growth.fill(connection, 450)
        await growth.churn(server, name, 450)
        left = "SELECT count(*) FROM outbox WHERE status <> 'accepted'"
        assert await connection.fetchval(left) == 0


@pytest.mark.parametrize(("met", "told"), [(True, "| 1.5 | met |"), (False, "| 1.5 | not met |")])
def test_a_goal_stands_beside_what_was_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    met: bool,  # noqa: FBT001 - a parameter of the test
    told: str,
) -> None:
    """The report says of each goal whether it was met."""
    monkeypatch.setattr(report, "LIBRARIES", ("aiohttp",))  # the peers are not in this environment
    goal = report.Target("rate", "at least 2", "1.5", met=met)
    finding = report.Finding("case", "A case", ("", "rate"), [["ours", "1.5"]], [goal], [], {})
    report.write(tmp_path, "made", report.circumstances("python -m bench"), [finding])
    assert told in (tmp_path / "made.md").read_text()
