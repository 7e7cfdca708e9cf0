"""Claims on a real PostgreSQL: what is picked, in which order, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import asyncpg
import pytest

from dispatcher.db import egress, outbox, services
from dispatcher.db.outbox import GUARD, HORIZON, ClaimRefused
from dispatcher.domain.outcomes import RELEASED
from tests.builders import NUMBER, SERVICE, TEXT, add_message, add_messages, add_service
from tests.integration.peers import (
    Connection,
    Peer,
    message,
    midweek,
    peer,
    statuses,
    used,
    wait_for,
)

OTHER = 43
NOW = datetime.now(UTC)
"""Only for what lies hours before or after."""


@pytest.fixture
async def worker(database: str) -> AsyncIterator[Peer]:
    """A worker that has entered itself."""
    async with peer(database) as entered:
        yield entered


async def test_claimed_row(connection: Connection, worker: Peer) -> None:
    """A claimed row is `sending`, held by its worker under a new claim number, and debited."""
    await add_service(connection, user_id=7, timezone=midweek())
    claimed = await add_message(connection, extended=False)

    claim = await worker.claim()

    (row,) = claim.sending
    assert (row["id"], row["number"], row["text"]) == (claimed, NUMBER, TEXT)
    assert (row["extended"], row["attempts"], row["claim_no"]) == (False, 0, 1)
    assert (row["slot"], row["expires"]) == (None, None)
    (service,) = claim.services
    assert (service["user_id"], service["delay"], service["send_before"]) == (7, None, None)
    stored = await message(connection, claimed)
    assert (stored["status"], stored["worker_id"], stored["claim_no"]) == (
        "sending",
        worker.worker_id,
        1,
    )
    assert stored["claimed_at"] == stored["status_at"] > stored["created_at"]
    assert await used(connection) == (1, 1, 1)
    assert claim.refused == claim.unread == []


async def test_order(connection: Connection, worker: Peer) -> None:
    """Higher priority goes first, then what was due earlier, then what was inserted earlier."""
    await add_service(connection)
    early, late = NOW - timedelta(hours=2), NOW - timedelta(hours=1)
    expected = [
        await add_message(connection, priority=priority, send_after=due)
        for priority, due in [(9, late), (9, late), (0, early), (0, late), (-5, early)]
    ]
    expected.insert(0, await add_message(connection, priority=9, send_after=early))

    assert await worker.ids() == expected


async def test_retry_at_counts_as_due(connection: Connection, worker: Peer) -> None:
    """A message that goes back is due when both its times have come, and keeps its turn by them."""
    await add_service(connection)
    hour = timedelta(hours=1)
    last = await add_message(connection, send_after=NOW - 3 * hour, retry_at=NOW - hour)
    first = await add_message(connection, send_after=NOW - 2 * hour)
    await add_message(connection, send_after=NOW - hour, retry_at=NOW + hour)
    await add_message(connection, send_after=NOW + hour, retry_at=NOW - hour)

    assert await worker.ids() == [first, last]


async def test_not_before_its_time(connection: Connection, worker: Peer) -> None:
    """A message with `send_after` a moment ahead is left, and claimed once that has come."""
    await add_service(connection)
    early = await add_message(connection)
    await connection.execute(
        "UPDATE outbox SET send_after = clock_timestamp() + interval '0.3 s' WHERE id = $1", early
    )
    assert await worker.ids() == []

    assert await wait_for(worker.ids, "the claim") == [early]
    assert await connection.fetchval("SELECT claimed_at >= send_after FROM outbox")


@pytest.mark.parametrize("status", ["accepted", "rejected", "cancelled", "unknown", "delivered"])
async def test_only_pending(connection: Connection, worker: Peer, status: str) -> None:
    """A message that is not `pending` is never claimed."""
    await add_service(connection)
    await add_message(connection, status=status)

    assert await worker.ids() == []
    assert await worker.waiting() == []


async def test_places(connection: Connection, worker: Peer) -> None:
    """Each service gets at most the places it was asked for, and leaves the rest."""
    for service in (SERVICE, OTHER, 44):
        await add_service(connection, service)
        await add_messages(connection, 5, service_id=service)

    claim = await worker.claim({SERVICE: 2, OTHER: 3})

    assert [row["service_id"] for row in claim.sending] == [SERVICE] * 2 + [OTHER] * 3
    assert await statuses(connection) == {"sending": 5, "pending": 10}


async def test_locked_row_is_passed_over(
    database: str, connection: Connection, worker: Peer
) -> None:
    """A row that a user's transaction holds is skipped without waiting, and claimed later."""
    await add_service(connection)
    ids = await add_messages(connection, 3)
    async with connection.transaction():
        await connection.execute("UPDATE outbox SET batch = 'x' WHERE id = $1", ids[0])

        async with asyncio.timeout(10):
            assert await worker.ids() == ids[1:]

    assert await worker.ids() == ids[:1]


async def test_cancel_and_claim_never_both(
    database: str, connection: Connection, worker: Peer
) -> None:
    """Of a cancellation and a claim at the same moment exactly one takes effect."""
    await add_service(connection)
    ids = await add_messages(connection, 200)
    cancel = "UPDATE outbox SET status = 'cancelled' WHERE id = ANY ($1) AND status = 'pending'"

    claimed, _ = await asyncio.gather(worker.ids(200), connection.execute(cancel, ids[::-1]))

    counts = await statuses(connection)
    assert counts.get("sending", 0) == len(claimed)
    assert counts.get("cancelled", 0) == 200 - len(claimed)


# ------------------------------------------------------------------ refused without a request


@pytest.mark.parametrize(
    ("columns", "status", "error"),
    [
        ({"text": ""}, "rejected", "The text is empty; write one."),
        (
            {"text": "ж" * 161},
            "rejected",
            "The text has 161 characters; the provider takes at most 160.",
        ),
        (
            {"text": "Hello"},
            "rejected",
            "The text matches none of the service's patterns; change one of them.",
        ),
        (
            {"expires_at": NOW - timedelta(hours=1)},
            "expired",
            "Its expires_at passed before it could be sent.",
        ),
        (
            {"expires_at": NOW - timedelta(hours=1), "text": ""},
            "expired",
            "Its expires_at passed before it could be sent.",
        ),
    ],
)
async def test_refused_locally(
    connection: Connection, worker: Peer, columns: dict[str, object], status: str, error: str
) -> None:
    """What must not go is ended by the claim with its reason, and costs no quota and no attempt."""
    await add_service(connection, patterns=["Your.*", "ж*", ""], timezone=midweek())
    refused = await add_message(connection, **columns)
    good = await add_message(connection)

    claim = await worker.claim()

    assert [(row["id"], row["status"], row["error"]) for row in claim.refused] == [
        (refused, status, error)
    ]
    assert [row["id"] for row in claim.sending] == [good]
    row = await message(connection, refused)
    assert (row["status"], row["error"], row["attempts"]) == (status, error, 0)
    assert (row["worker_id"], row["claim_no"], row["claimed_at"]) == (None, 0, None)
    assert await used(connection) == (1, 1, 1)


@pytest.mark.parametrize("text", ["a" * 160, "ж" * 160, "🙂" * 160, " ", "a\nb"])
async def test_length_is_in_code_points(connection: Connection, worker: Peer, text: str) -> None:
    """Any text of 1 to 160 Unicode code points goes, as it is."""
    await add_service(connection)
    await add_message(connection, text=text)

    (row,) = (await worker.claim()).sending

    assert row["text"] == text


async def test_refused_one_takes_no_quota_from_the_next(
    connection: Connection, worker: Peer
) -> None:
    """With quota for one, a message behind a refused one still goes."""
    await add_service(connection, day_limit=1, timezone=midweek())
    await add_message(connection, text="")
    good = await add_message(connection)

    claimed = await worker.ids() + await worker.ids()

    assert claimed == [good]


async def test_refused_one_takes_no_slot(connection: Connection, worker: Peer) -> None:
    """A refused message leaves no gap in the slots of its service."""
    await add_service(connection, min_delay=timedelta(milliseconds=20))
    for text in ("a", "", "b", "", "c"):
        await add_message(connection, text=text)

    slots = [row["slot"] for row in (await worker.claim()).sending]

    assert len(slots) == 3
    assert all(b - a == pytest.approx(0.02 + GUARD, abs=1e-5) for a, b in pairwise(slots))


# ------------------------------------------------------------------ numbers


async def test_number_is_read_before_it_is_claimed(connection: Connection, worker: Peer) -> None:
    """A number written in another way is left for reading, then goes out in its canonical form."""
    await add_service(connection, timezone=midweek())
    written = await add_message(connection, msisdn="088 123 4567")

    claim = await worker.claim()
    assert claim.sending == claim.refused == []
    assert [(row["id"], row["msisdn"]) for row in claim.unread] == [(written, "088 123 4567")]
    assert (await message(connection, written))["status"] == "pending"
    assert await used(connection) == (0, 0, 0)

    assert await outbox.read_numbers(worker.session, {(written, "088 123 4567"): NUMBER}) == []
    (row,) = (await worker.claim()).sending
    assert row["number"] == NUMBER
    assert (await message(connection, written))["msisdn"] == "088 123 4567"


async def test_number_that_is_put_right(connection: Connection, worker: Peer) -> None:
    """A number that is changed while its message waits goes out as it is now, read or not."""
    await add_service(connection, timezone=midweek())
    change = "UPDATE outbox SET msisdn = $2 WHERE id = $1"
    read = await add_message(connection, msisdn="088 123 4567")
    unread = await add_message(connection, msisdn="088 123 4567")
    await outbox.read_numbers(worker.session, {(read, "088 123 4567"): NUMBER})
    await connection.execute(change, read, "0887654321")
    await connection.execute(change, unread, "0887654321")
    await outbox.read_numbers(
        worker.session, {(unread, "088 123 4567"): NUMBER, (unread, "0887654321"): None}
    )

    claim = await worker.claim()

    assert claim.sending == []
    assert [(row["id"], row["msisdn"]) for row in claim.unread] == [(read, "0887654321")]
    assert (await message(connection, unread))["status"] == "rejected"


async def test_no_number_is_rejected(connection: Connection, worker: Peer) -> None:
    """What is no number is rejected with a reason, once, and keeps what the user wrote."""
    await add_service(connection)
    bad = await add_message(connection, msisdn="hello")
    cancelled = await add_message(connection, msisdn="hello", status="cancelled")

    refused = await outbox.read_numbers(
        worker.session, {(bad, "hello"): None, (cancelled, "hello"): None}
    )

    assert [row["id"] for row in refused] == [bad]
    row = await message(connection, bad)
    assert (row["status"], row["msisdn"]) == ("rejected", "hello")
    assert row["error"] == "The number is not one that can be dialled; correct it."
    assert row["status_at"] > row["created_at"]
    assert (await message(connection, cancelled))["status"] == "cancelled"


@pytest.mark.parametrize("msisdn", ["359881234567\n", " 359881234567", "0359881234567", "1" * 16])
async def test_only_canonical_numbers_are_taken_unread(
    connection: Connection, worker: Peer, msisdn: str
) -> None:
    """The claim itself takes ten to fifteen plain digits and nothing that only looks like it."""
    await add_service(connection)
    await add_message(connection, msisdn=msisdn)

    claim = await worker.claim()

    assert claim.sending == []
    assert len(claim.unread) == 1


# ------------------------------------------------------------------ what is closed


async def test_paused_service(connection: Connection, worker: Peer) -> None:
    """Of a paused service nothing is claimed, not even as a probe."""
    await add_service(connection, paused=True, blocked_until=NOW, blocked_reason="INVALID_INPUT")
    await add_message(connection)

    assert (await worker.claim(service=True)).sending == []
    (waits,) = await worker.waiting()
    assert (waits.may_send, waits.probe_due) == (False, False)


async def test_blocked_service(connection: Connection, worker: Peer) -> None:
    """Of a blocked service nothing is claimed but a probe, and that is due at its time."""
    await add_service(
        connection, blocked_until=NOW + timedelta(hours=1), blocked_reason="SERVICE_DISABLED"
    )
    await add_message(connection)

    assert await worker.ids() == []
    (waits,) = await worker.waiting()
    assert (waits.may_send, waits.probe_due) == (False, False)
    await connection.execute("UPDATE service SET blocked_until = now()")
    (waits,) = await worker.waiting()
    assert (waits.may_send, waits.probe_due) == (False, True)
    assert len((await worker.claim(service=True)).sending) == 1


async def test_blocked_for_one_egress(database: str, connection: Connection, worker: Peer) -> None:
    """A service blocked for one egress goes on through another."""
    await add_service(connection)
    await add_messages(connection, 2)
    await services.block(
        worker.session, SERVICE, "INVALID_IP", 600, probe=False, egress=worker.egress
    )

    assert await worker.ids() == []
    (waits,) = await worker.waiting()
    assert not waits.may_send
    async with peer(database, egress="other") as other:
        (waits,) = await other.waiting()
        assert waits.may_send
        assert len(await other.ids()) == 2


async def test_closed_egress(database: str, connection: Connection, worker: Peer) -> None:
    """Through a closed egress nothing is claimed but a probe; another egress goes on."""
    await add_service(connection)
    await add_messages(connection, 3)
    await egress.sicken(worker.session, worker.egress)

    assert await worker.ids() == []
    (probed,) = (await worker.claim(1, egress=True)).services
    async with peer(database, egress="other") as other:
        assert len(await other.ids()) == 2
    assert probed["ban_episode"] == 0


async def test_no_claim_without_a_lease(database: str, connection: Connection) -> None:
    """A worker whose lease has run out claims nothing."""
    await add_service(connection)
    await add_message(connection)
    async with peer(database) as late:
        await connection.execute("UPDATE worker SET lease_until = clock_timestamp()")

        assert await late.ids() == []


async def test_claim_that_fails_names_no_culprit_but_claims_nothing(
    connection: Connection, worker: Peer
) -> None:
    """A service whose rows make the claim fail holds up nobody who is asked for without it."""
    await add_service(connection)
    await add_service(connection, OTHER)
    await add_messages(connection, 2)
    await add_message(connection, service_id=OTHER)
    await connection.execute("UPDATE service SET min_delay = '300000 years' WHERE service_id = 42")

    with pytest.raises(ClaimRefused):
        await worker.claim({SERVICE: 2, OTHER: 1})
    assert await statuses(connection) == {"pending": 3}
    with pytest.raises(ClaimRefused):
        await worker.claim({SERVICE: 2})
    assert len(await worker.ids({OTHER: 1})) == 1


# ------------------------------------------------------------------ quota


@pytest.mark.parametrize(
    ("limits", "place"),
    [
        ({"day_limit": 3}, "day"),
        ({"week_limit": 3}, "week"),
        ({"month_limit": 3}, "month"),
        ({"day_limit": 9, "week_limit": 8, "month_limit": 3}, "month"),
        ({"day_limit": 3, "week_limit": 3, "month_limit": 3}, "day"),
    ],
)
async def test_least_limit_holds(
    connection: Connection, worker: Peer, limits: dict[str, int], place: str
) -> None:
    """The window with the least left decides and is told, and all windows are debited."""
    await add_service(connection, timezone=midweek(), **limits)
    await add_messages(connection, 5)

    claim = await worker.claim()

    assert len(claim.sending) == 3
    assert await used(connection) == (3, 3, 3)
    assert [row["spent"] for row in claim.services] == [place]
    assert claim.services[0]["send_before"] is not None
    assert await worker.ids() == []


async def test_limit_of_none(connection: Connection, worker: Peer) -> None:
    """With a limit of 0 nothing goes, and nothing is debited."""
    await add_service(connection, day_limit=0, timezone=midweek())
    await add_message(connection)

    assert await worker.ids() == []
    assert await used(connection) == (0, 0, 0)


async def test_limit_below_what_is_used(connection: Connection, worker: Peer) -> None:
    """A limit that an operator lowers below the count stops the service, and raised lets it go."""
    await add_service(connection, day_limit=5, timezone=midweek())
    await add_messages(connection, 9)
    assert len(await worker.ids(4)) == 4

    await connection.execute("UPDATE service SET day_limit = 2")
    assert await worker.ids() == []
    await connection.execute("UPDATE service SET day_limit = 6")
    assert len(await worker.ids()) == 2
    await connection.execute("UPDATE service SET day_limit = NULL")
    assert len(await worker.ids()) == 3
    assert await used(connection) == (9, 9, 9)


async def test_concurrent_claims_use_the_limit_exactly(
    database: str, connection: Connection
) -> None:
    """Eight workers at once claim each message once, and all of the quota and not one more."""
    await add_service(connection, day_limit=100, timezone=midweek())
    await add_service(connection, OTHER)
    await add_messages(connection, 150)
    await add_messages(connection, 150, service_id=OTHER)
    claimed: list[int] = []

    async def work() -> None:
        async with peer(database) as worker:
            while got := await worker.ids({OTHER: 7, SERVICE: 7}):
                claimed.extend(got)

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(work())

    assert len(claimed) == len(set(claimed)) == 250
    assert await used(connection, SERVICE) == (100, 100, 100)
    assert await used(connection, OTHER) == (150, 150, 150)


async def test_claims_and_returns_at_once_stay_exact(database: str, connection: Connection) -> None:
    """While workers claim, accept and give back at once, the count stays what is accepted."""
    await add_service(connection, day_limit=60, timezone=midweek())
    await add_messages(connection, 100)

    async def work(worker: Peer, turn: int) -> None:
        while rows := (await worker.claim(3)).sending:
            turn += 1
            refuse = turn % 3 == 0
            await worker.record(rows, RELEASED if refuse else b"MSG_OK")

    async with (
        peer(database) as first,
        peer(database) as second,
        peer(database) as third,
        asyncio.TaskGroup() as group,
    ):
        for number, worker in enumerate((first, second, third)):
            group.create_task(work(worker, number))

    assert await statuses(connection) == {"accepted": 60, "pending": 40}
    assert await used(connection) == (60, 60, 60)


# ------------------------------------------------------------------ slots


async def test_slots_of_several_workers_are_apart(database: str, connection: Connection) -> None:
    """However many workers claim, no two slots of a service are closer than its delay."""
    delay = 0.004
    await add_service(connection, min_delay=timedelta(seconds=delay))
    await add_messages(connection, 300)
    slots: list[float] = []

    async def work() -> None:
        async with peer(database) as worker:
            while len(slots) < 250:
                rows = (await worker.claim(11)).sending
                slots.extend(row["slot"] for row in rows)
                slots.extend([await services.reserve(worker.session, SERVICE)] if rows else [])

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(work())

    assert len(slots) == len(set(slots))
    assert all(b - a >= delay + GUARD - 1e-5 for a, b in pairwise(sorted(slots)))


async def test_no_slot_beyond_the_horizon(connection: Connection, worker: Peer) -> None:
    """No more is claimed than may go within about a second, and the slots begin at once."""
    await add_service(connection, min_delay=timedelta(milliseconds=100))
    await add_messages(connection, 50)

    claim = await worker.claim(50)

    slots = [row["slot"] for row in claim.sending]
    assert 9 <= len(slots) <= 10
    assert 0 < slots[0] - claim.services[0]["now"] < 0.1
    assert slots[-1] - claim.services[0]["now"] <= HORIZON
    assert claim.services[0]["slots_short"]

    again = await worker.claim(50)

    assert len(again.sending) < len(claim.sending)
    assert all(row["slot"] <= again.services[0]["now"] + HORIZON for row in again.sending)


async def test_first_slot_of_a_long_delay(connection: Connection, worker: Peer) -> None:
    """Where the delay is longer than the horizon, messages go one by one."""
    await add_service(connection, min_delay=timedelta(hours=1))
    await add_messages(connection, 3)

    assert len(await worker.ids()) == 1
    assert await worker.ids() == []


async def test_extra_delay_paces_a_service_without_delay(
    connection: Connection, worker: Peer
) -> None:
    """A service that the provider found too fast is paced, even if it has no delay of its own."""
    await add_service(connection)
    await add_messages(connection, 5)
    (row,) = (await worker.claim(1)).sending
    assert row["slot"] is None

    await services.slow(worker.session, row["id"], row["claim_no"])
    claim = await worker.claim()

    assert all(
        b["slot"] - a["slot"] == pytest.approx(services.STEP_LEAST, abs=1e-5)
        for a, b in pairwise(claim.sending)
    )
    assert claim.services[0]["delay"] == pytest.approx(services.STEP_LEAST)


# ------------------------------------------------------------------ what waits


async def test_waiting_tells_services_with_due_messages(
    connection: Connection, worker: Peer
) -> None:
    """Of many services those are told that have a due message at any priority, in their order."""
    for service in range(1, 8):
        await add_service(connection, service)
    await add_message(connection, service_id=6, priority=-9)
    await add_message(connection, service_id=6, send_after=NOW + timedelta(hours=1), priority=9)
    await add_message(connection, service_id=2)
    await add_message(connection, service_id=3, send_after=NOW + timedelta(hours=1))
    await add_message(connection, service_id=4, retry_at=NOW + timedelta(hours=1))
    await add_message(connection, service_id=5, status="cancelled")

    assert await worker.waiting() == [
        outbox.Waiting(2, may_send=True, probe_due=False, windows_open=False),
        outbox.Waiting(6, may_send=True, probe_due=False, windows_open=False),
    ]
    await worker.claim({2: 0, 6: 0})
    assert all(waits.windows_open for waits in await worker.waiting())


async def test_windows_that_are_not_open(connection: Connection, worker: Peer) -> None:
    """Without the rows that count its windows a service is not claimed for, never uncounted."""
    await add_service(connection, timezone=midweek())
    await add_message(connection)

    claim = await outbox.claim(worker.session, worker.worker_id, {SERVICE: 5})

    assert claim.sending == claim.services == []
    assert len(await worker.ids()) == 1


async def test_failing_claim_is_no_lost_database(connection: Connection, worker: Peer) -> None:
    """A claim that the data makes fail tells its SQLSTATE, and the session goes on."""
    await add_service(connection)
    await add_message(connection)
    await connection.execute("UPDATE service SET min_delay = '300000 years'")

    with pytest.raises(ClaimRefused) as caught:
        await worker.claim()

    assert caught.value.sqlstate == asyncpg.DatetimeFieldOverflowError.sqlstate
    assert len(await worker.session.fetch("SELECT 1")) == 1
