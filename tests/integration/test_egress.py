"""What the workers behind one IP address know together, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import pytest

from dispatcher.db import egress
from dispatcher.domain.message import Probe
from tests.integration.peers import Connection, Peer, peer

NAME = "default"


@pytest.fixture
async def worker(database: str) -> AsyncIterator[Peer]:
    """A worker behind the egress `default`."""
    async with peer(database) as entered:
        yield entered


async def row(connection: Connection) -> asyncpg.Record:
    """The egress, and the seconds until its probes."""
    found = await connection.fetchrow(
        """
        SELECT *,
            extract(epoch FROM banned_until - clock_timestamp())::float8 AS ban_in,
            extract(epoch FROM ill_until - clock_timestamp())::float8 AS ill_in
        FROM egress WHERE name = $1
        """,
        NAME,
    )
    assert found is not None
    return found


async def make_due(connection: Connection) -> None:
    """The time for a probe has come."""
    await connection.execute(
        "UPDATE egress SET banned_until = now() WHERE banned_until IS NOT NULL"
    )
    await connection.execute("UPDATE egress SET ill_until = now() WHERE ill_until IS NOT NULL")


async def take_due(connection: Connection, worker: Peer) -> Probe:
    """Take the probe at its time."""
    await make_due(connection)
    probe = await egress.take_probe(worker.session, NAME, 45)
    assert probe is not None
    return probe


async def taken(connection: Connection, ban_episode: int) -> Probe:
    """A probe of an episode, as if it had been taken just now."""
    found = await row(connection)
    return Probe(ban_episode, found["banned_until"], found["ill_until"])


async def test_open_at_first(worker: Peer) -> None:
    """An egress that nobody knows anything of is open."""
    assert await egress.state(worker.session, NAME) == egress.State(
        banned=False, ill=False, ban_episode=0, probe_in=None
    )


async def test_ban(connection: Connection, worker: Peer) -> None:
    """A ban closes the egress for its wait with the jitter, and counts an episode."""
    begun = await egress.ban(worker.session, NAME, 0, 60, 1.25)

    assert begun is not None
    assert begun["ban_episode"] == 1
    stored = await row(connection)
    assert stored["ban_wait"] == timedelta(seconds=60)
    assert 74 < stored["ban_in"] <= 75
    state = await egress.state(worker.session, NAME)
    assert (state.banned, state.ill, state.open, state.ban_episode) == (True, False, False, 1)
    assert state.probe_in is not None
    assert 74 < state.probe_in <= 75


async def test_many_answers_are_one_ban(database: str, connection: Connection) -> None:
    """A hundred messages in flight that are refused at once open one episode."""
    async with peer(database) as first, peer(database) as second:
        begun = await asyncio.gather(
            *(egress.ban(p.session, NAME, 0, 60, 1) for p in (first, second) for _ in range(50))
        )

    assert len([b for b in begun if b is not None]) == 1
    assert (await row(connection))["ban_episode"] == 1


async def test_late_answer_of_an_old_episode(connection: Connection, worker: Peer) -> None:
    """A request that began before traffic resumed opens no new episode; one after it does."""
    await egress.ban(worker.session, NAME, 0, 60, 1)
    await egress.resume(worker.session, NAME, await taken(connection, 1))

    assert await egress.ban(worker.session, NAME, 0, 60, 1) is None
    assert (await egress.state(worker.session, NAME)).open
    assert await egress.ban(worker.session, NAME, 1, 60, 1) is not None
    assert (await row(connection))["ban_episode"] == 2


async def test_probe_answered_by_a_ban(connection: Connection, worker: Peer) -> None:
    """Each probe that meets the ban doubles the wait up to the most; jitter comes on top."""
    await egress.ban(worker.session, NAME, 0, 10, 1)
    waits = []
    for _ in range(4):
        told = await egress.probe_banned(
            worker.session, NAME, await taken(connection, 1), 10, 45, 1.1
        )
        assert told is not None
        assert told["ban_episode"] == 1
        stored = await row(connection)
        assert stored["ban_wait"].total_seconds() * 1.1 - 1 < stored["ban_in"]
        assert stored["ban_in"] <= stored["ban_wait"].total_seconds() * 1.1
        waits.append(stored["ban_wait"].total_seconds())

    assert waits == [20, 40, 45, 45]


async def test_answer_of_a_probe_counts_once(connection: Connection, worker: Peer) -> None:
    """Told again, for the database's word was lost, a probe's ban doubles nothing once more."""
    await egress.ban(worker.session, NAME, 0, 10, 1)
    probe = await take_due(connection, worker)

    assert await egress.probe_banned(worker.session, NAME, probe, 10, 3600, 1) is not None
    assert await egress.probe_banned(worker.session, NAME, probe, 10, 3600, 1) is None

    assert (await row(connection))["ban_wait"] == timedelta(seconds=20)


async def test_late_answer_of_a_probe(connection: Connection, worker: Peer) -> None:
    """Once another probe was taken, that one alone says whether the ban is over."""
    await egress.ban(worker.session, NAME, 0, 10, 1)
    late = await take_due(connection, worker)
    await take_due(connection, worker)

    assert not await egress.resume(worker.session, NAME, late)
    assert await egress.probe_banned(worker.session, NAME, late, 10, 3600, 1) is None

    assert (await egress.state(worker.session, NAME)).banned
    assert (await row(connection))["ban_wait"] == timedelta(seconds=10)


async def test_wait_falls_back_to_the_start(connection: Connection, worker: Peer) -> None:
    """Once traffic has resumed the next ban begins with the first wait again."""
    await egress.ban(worker.session, NAME, 0, 10, 1)
    await egress.probe_banned(worker.session, NAME, await taken(connection, 1), 10, 3600, 1)

    assert await egress.resume(worker.session, NAME, await taken(connection, 1))
    assert not await egress.resume(worker.session, NAME, await taken(connection, 1))
    await egress.ban(worker.session, NAME, 1, 10, 1)

    assert (await row(connection))["ban_wait"] == timedelta(seconds=10)


async def test_late_resume_of_an_old_episode(connection: Connection, worker: Peer) -> None:
    """What a probe has found does not lift a ban that began after it."""
    await egress.ban(worker.session, NAME, 0, 10, 1)
    await egress.resume(worker.session, NAME, await taken(connection, 1))
    await egress.ban(worker.session, NAME, 1, 10, 1)

    assert not await egress.resume(worker.session, NAME, await taken(connection, 1))

    assert (await egress.state(worker.session, NAME)).banned


async def test_late_word_of_an_old_probe(connection: Connection, worker: Peer) -> None:
    """A probe that ends late neither shortens a ban that began after it nor begins one anew."""
    await egress.sicken(worker.session, NAME)
    probe = await take_due(connection, worker)
    await egress.ban(worker.session, NAME, 0, 60, 1)
    before = await row(connection)

    await egress.return_probe(worker.session, NAME, probe)
    assert (
        await egress.probe_banned(worker.session, NAME, await taken(connection, 0), 10, 10, 1)
        is None
    )

    assert (await row(connection))["ban_wait"] == before["ban_wait"]
    assert ((await egress.state(worker.session, NAME)).probe_in or 0) > 59
    await egress.resume(worker.session, NAME, await taken(connection, 1))
    assert (
        await egress.probe_banned(worker.session, NAME, await taken(connection, 1), 10, 10, 1)
        is None
    )
    assert (await egress.state(worker.session, NAME)).open


async def test_one_probe_for_all_workers(database: str, connection: Connection) -> None:
    """Of many workers one takes the probe, and only once it is due."""
    async with peer(database) as first, peer(database) as second, peer(database) as third:
        workers = (first, second, third)
        await egress.ban(first.session, NAME, 0, 60, 1)
        assert {await egress.take_probe(w.session, NAME, 5) for w in workers} == {None}
        await make_due(connection)

        taken = await asyncio.gather(
            *(egress.take_probe(w.session, NAME, 5) for w in workers for _ in range(10))
        )

    assert len([probe for probe in taken if probe is not None]) == 1
    assert 59 < (await row(connection))["ban_in"] <= 60


async def test_probe_is_nobody_elses_while_it_lasts(connection: Connection, worker: Peer) -> None:
    """A short wait lets nobody probe before the request that probes must have ended."""
    await egress.ban(worker.session, NAME, 0, 0.001, 1)
    await make_due(connection)

    assert await egress.take_probe(worker.session, NAME, 45) is not None
    assert 44 < (await row(connection))["ban_in"] <= 45


async def test_probe_given_back(connection: Connection, worker: Peer) -> None:
    """A probe for which there was no message is due again at once."""
    await egress.ban(worker.session, NAME, 0, 60, 1)
    await egress.sicken(worker.session, NAME)
    probe = await take_due(connection, worker)

    await egress.return_probe(worker.session, NAME, probe)

    assert await egress.take_probe(worker.session, NAME, 45) is not None


async def test_late_probe_changes_no_wait(connection: Connection, worker: Peer) -> None:
    """A probe that ends late leaves the waits that the next one has brought."""
    await egress.ban(worker.session, NAME, 0, 60, 1)
    await egress.sicken(worker.session, NAME)
    late = await take_due(connection, worker)
    probe = await take_due(connection, worker)
    await egress.probe_unanswered(worker.session, NAME, probe, doubt=True, jitter=1)
    before = await row(connection)

    await egress.return_probe(worker.session, NAME, late)
    await egress.probe_unanswered(worker.session, NAME, late, doubt=True, jitter=1)

    after = await row(connection)
    assert (after["banned_until"], after["ill_until"]) == (
        before["banned_until"],
        before["ill_until"],
    )


async def test_illness_while_a_ban_is_probed(connection: Connection, worker: Peer) -> None:
    """A probe of a ban that is put back leaves an illness found meanwhile its wait."""
    await egress.ban(worker.session, NAME, 0, 60, 1)
    probe = await take_due(connection, worker)
    await egress.sicken(worker.session, NAME)

    await egress.return_probe(worker.session, NAME, probe)

    stored = await row(connection)
    assert stored["ban_in"] <= 0
    assert stored["ill_in"] > 4


async def test_open_egress_has_no_probe(connection: Connection, worker: Peer) -> None:
    """There is nothing to probe while the egress is open."""
    assert await egress.take_probe(worker.session, NAME, 5) is None
    await egress.sicken(worker.session, NAME)
    probe = await take_due(connection, worker)
    await egress.resume(worker.session, NAME, await taken(connection, 0))
    await egress.return_probe(worker.session, NAME, probe)
    assert (await egress.state(worker.session, NAME)).open


@pytest.mark.parametrize("doubt", [True, False])
async def test_unanswered_probe_of_a_ban(
    connection: Connection,
    worker: Peer,
    doubt: bool,  # noqa: FBT001 - a parameter by its name
) -> None:
    """A probe that never left or is in doubt is repeated after the same wait."""
    await egress.ban(worker.session, NAME, 0, 60, 1)
    probe = await take_due(connection, worker)

    await egress.probe_unanswered(worker.session, NAME, probe, doubt=doubt, jitter=1.1)

    stored = await row(connection)
    assert stored["ban_wait"] == timedelta(seconds=60)
    assert 65 < stored["ban_in"] <= 66
    assert stored["ill_until"] is None


async def test_illness(connection: Connection, worker: Peer) -> None:
    """An ill provider is given five seconds, then twice as long each time, up to five minutes."""
    assert await egress.sicken(worker.session, NAME) is not None
    assert await egress.sicken(worker.session, NAME) is None
    waits = [(await row(connection))["ill_wait"].total_seconds()]
    for _ in range(8):
        probe = await take_due(connection, worker)
        await egress.probe_unanswered(worker.session, NAME, probe, doubt=True, jitter=1)
        stored = await row(connection)
        waits.append(stored["ill_wait"].total_seconds())
        assert waits[-1] - 1 < stored["ill_in"] <= waits[-1]

    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]


async def test_probe_that_never_left_is_no_illness(connection: Connection, worker: Peer) -> None:
    """A probe of an ill provider that never left is repeated after the same wait."""
    await egress.sicken(worker.session, NAME)
    probe = await take_due(connection, worker)

    await egress.probe_unanswered(worker.session, NAME, probe, doubt=False, jitter=1)

    assert (await row(connection))["ill_wait"] == timedelta(seconds=5)


async def test_ban_found_by_the_probe_of_an_illness(connection: Connection, worker: Peer) -> None:
    """A probe of an ill provider that is answered by a ban ends the illness and begins the ban."""
    await egress.sicken(worker.session, NAME)

    told = await egress.probe_banned(worker.session, NAME, await taken(connection, 0), 60, 3600, 1)

    assert told is not None
    stored = await row(connection)
    assert (told["ban_episode"], stored["ban_wait"]) == (1, timedelta(seconds=60))
    assert (stored["ill_until"], stored["ill_wait"]) == (None, None)


async def test_both_at_once(connection: Connection, worker: Peer) -> None:
    """Banned and ill, the egress is probed when both waits are over, and opens at once."""
    await egress.ban(worker.session, NAME, 0, 60, 1)
    await egress.sicken(worker.session, NAME)
    state = await egress.state(worker.session, NAME)
    assert (state.banned, state.ill) == (True, True)
    assert state.probe_in is not None
    assert state.probe_in > 59
    await connection.execute("UPDATE egress SET banned_until = now()")
    assert await egress.take_probe(worker.session, NAME, 5) is None

    assert await egress.resume(worker.session, NAME, await taken(connection, 1))

    assert (await egress.state(worker.session, NAME)).open


async def test_egresses_are_apart(database: str, worker: Peer) -> None:
    """A ban of one IP address says nothing about another."""
    async with peer(database, egress="other") as other:
        await egress.ban(worker.session, NAME, 0, 60, 1)

        assert (await egress.state(other.session, "other")).open


async def test_all_are_told(database: str, connection: Connection, worker: Peer) -> None:
    """That an egress closes or opens reaches every worker at once."""
    heard: asyncio.Queue[str] = asyncio.Queue()
    await connection.add_listener("dispatcher", lambda *told: heard.put_nowait(str(told[-1])))

    await egress.ban(worker.session, NAME, 0, 60, 1)
    await egress.ban(worker.session, NAME, 0, 60, 1)
    await egress.resume(worker.session, NAME, await taken(connection, 1))
    await egress.resume(worker.session, NAME, await taken(connection, 1))
    await egress.sicken(worker.session, NAME)

    async with asyncio.timeout(10):
        told = [await heard.get() for _ in range(3)]
    assert told == ["closed:default", "open:default", "closed:default"]
