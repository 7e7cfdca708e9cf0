"""Windows on a real PostgreSQL: where they begin and end, and what the provider says of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dispatcher.db import quota
from dispatcher.db.outbox import Claim
from dispatcher.db.pool import Record
from dispatcher.embedded import EmbeddedPostgres
from tests.builders import SERVICE, add_message, add_messages, add_service
from tests.integration.peers import (
    Connection,
    Peer,
    midweek,
    peer,
    used,
    wait_for,
    zone_where,
)

PERIODS = ("day", "week", "month")

# ------------------------------------------------------------------ where windows begin

# As the claim and the others write them.
WINDOWS = """
SELECT
    date_trunc('day', c.moment, c.zone) AS day,
    date_trunc('week', c.moment, c.zone) AS week,
    date_trunc('month', c.moment, c.zone) AS month,
    (date_trunc('day', c.moment AT TIME ZONE c.zone) + interval '1 day') AT TIME ZONE c.zone
        AS tomorrow
FROM unnest($1::timestamptz[], $2::text[]) AS c (moment, zone)
"""

# All rules that people live under: whole and broken hours, clocks changed at midnight, by half an
# hour, in the south, on a Friday; a zone without any change; one that skipped a whole day.
ZONES = (
    "Europe/Sofia",
    "Europe/London",
    "America/New_York",
    "America/Havana",
    "America/Santiago",
    "America/St_Johns",
    "Asia/Kathmandu",
    "Asia/Gaza",
    "Australia/Lord_Howe",
    "Pacific/Chatham",
    "Africa/Casablanca",
    "UTC",
)
TURNS = [(datetime(2026, 3, 28, 20, tzinfo=UTC)), datetime(2026, 10, 24, 20, tzinfo=UTC)]
"""Evenings before the clocks change in Europe."""


def first_day(period: str, day: date) -> date:
    """The first day of the calendar day, ISO week or month of a day, or of the day after."""
    return {
        "day": day,
        "week": day - timedelta(days=day.weekday()),
        "month": day.replace(day=1),
        "tomorrow": day + timedelta(days=1),
    }[period]


def jumps(day: date, zone: ZoneInfo) -> bool:
    """Whether the clock is changed at this day's midnight, so that it comes twice or never."""
    midnight = datetime.combine(day, time(), zone)
    return midnight.utcoffset() != midnight.replace(fold=1).utcoffset()


@pytest.fixture(scope="module")
def calendar(postgres: EmbeddedPostgres) -> str:
    """A database that is asked about the calendar only."""
    return postgres.dsn


@given(
    cases=st.lists(
        st.tuples(
            st.integers(1_420_000_000, 2_114_000_000).map(lambda s: datetime.fromtimestamp(s, UTC)),
            st.sampled_from(ZONES),
        ),
        min_size=30,
        max_size=100,
    )
)
@example(
    cases=[
        (evening + timedelta(minutes=10 * step), zone)
        for evening in TURNS
        for step in range(72)
        for zone in ("Europe/Sofia", "Europe/London")
    ]
)
@example(
    cases=[
        (datetime(2026, 11, 1, 3, tzinfo=UTC) + timedelta(minutes=10 * step), "America/Havana")
        for step in range(30)
    ]
)
@settings(max_examples=20, deadline=None)
def test_windows_are_those_of_the_calendar(
    calendar: str, cases: list[tuple[datetime, str]]
) -> None:
    """The database's days, weeks and months are those of Python's calendar, whatever the zone."""

    async def windows() -> list[Record]:
        connection = await asyncpg.connect(calendar)
        try:
            return await connection.fetch(WINDOWS, *zip(*cases, strict=True))
        finally:
            await connection.close()

    for (moment, name), row in zip(cases, asyncio.run(windows()), strict=True):
        zone = ZoneInfo(name)
        for period, start in row.items():
            first = first_day(period, moment.astimezone(zone).date())
            assert start.astimezone(zone).date() == first, (moment, name, period)
            if not jumps(first, zone):
                assert start == datetime.combine(first, time(), zone), (moment, name, period)


# ------------------------------------------------------------------ where windows end


@pytest.fixture
async def worker(database: str) -> AsyncIterator[Peer]:
    """A worker that has entered itself."""
    async with peer(database) as entered:
        yield entered


SUNDAY, MONDAY, WEDNESDAY = 6, 0, 2


async def nearing(connection: Connection, weekday: int) -> None:
    """Two seconds from now a weekday ends for the service."""
    await connection.execute(
        "UPDATE service SET timezone = $1", zone_where(weekday, time(23, 59, 58))
    )


@pytest.mark.parametrize(
    ("limits", "weekday", "period"),
    [({"day_limit": 2}, WEDNESDAY, "day"), ({"week_limit": 2}, SUNDAY, "week")],
)
async def test_next_window_brings_the_whole_limit_again(
    connection: Connection, worker: Peer, limits: dict[str, int], weekday: int, period: str
) -> None:
    """When a window ends, and not before, exactly its limit may be sent once more."""
    await add_service(connection, **limits)
    await add_messages(connection, 9)
    await nearing(connection, weekday)

    first = await worker.claim()
    second = await wait_for(lambda: brought(worker), "the next window")

    assert (len(first.sending), len(second.sending)) == (2, 2)
    assert await worker.ids() == []
    (before,), (after,) = first.services, second.services
    assert before["now"] < before["send_before"] <= after["now"]
    assert after["send_before"] == pytest.approx(before["send_before"] + 86_400)
    counts = await connection.fetch(
        "SELECT used FROM quota_usage WHERE period = $1 AND used > 0", period
    )
    assert [row["used"] for row in counts] == [2, 2]


async def brought(worker: Peer) -> Claim | None:
    """One more claim, if it brings anything."""
    claim = await worker.claim()
    return claim if claim.sending else None


async def test_change_of_zone(connection: Connection, worker: Peer) -> None:
    """A service that is given another time zone is counted in the windows of that one."""
    await add_service(connection, day_limit=2, timezone=midweek())
    await add_messages(connection, 5)
    assert len(await worker.ids()) == 2

    await connection.execute("UPDATE service SET timezone = $1", zone_where(WEDNESDAY, time(11)))

    assert len(await worker.ids()) == 2


async def test_windows_are_opened_once(database: str, connection: Connection) -> None:
    """Any number of workers may open the windows of a service at the same moment."""
    await add_service(connection, timezone=midweek())
    async with peer(database) as first, peer(database) as second:
        for _ in range(5):
            await asyncio.gather(
                quota.open_windows(first.session, [SERVICE, 999]),
                quota.open_windows(second.session, [999, SERVICE]),
            )

    assert await connection.fetchval("SELECT count(*) FROM quota_usage") == 3
    assert await connection.fetchval("SELECT count(*) FROM pace") == 1


# ------------------------------------------------------------------ what the provider says


async def refused(
    connection: Connection, worker: Peer, period: str, count: int = 1
) -> list[Record]:
    """Claimed messages that the provider refuses for a limit; returns what closed their window."""
    await add_messages(connection, count)
    rows = (await worker.claim(count)).sending
    assert len(rows) == count
    closed = [
        await quota.close_window(worker.session, row["id"], row["claim_no"], period) for row in rows
    ]
    await worker.record(rows, f"LIMIT_{period.upper()}".encode())
    return [window for window in closed if window is not None]


@pytest.mark.parametrize("period", PERIODS)
@pytest.mark.parametrize("limits", [{}, {"day_limit": 100, "week_limit": 100, "month_limit": 100}])
async def test_limit_is_believed(
    connection: Connection, worker: Peer, period: str, limits: dict[str, int]
) -> None:
    """A LIMIT_… answer closes its window to the end, whatever we have counted ourselves."""
    zone = midweek()
    await add_service(connection, timezone=zone, **limits)

    (window,) = await refused(connection, worker, period)

    end = await connection.fetchval(
        "SELECT (date_trunc($1, now() AT TIME ZONE $2) + ('1 ' || $1)::interval) AT TIME ZONE $2",
        period,
        zone,
    )
    assert (window["service_id"], window["period"], window["closed_until"]) == (
        SERVICE,
        period,
        end,
    )
    claim = await worker.claim()
    assert claim.sending == []
    # The provider's word has been told already; our own count is not spent.
    assert [row["spent"] for row in claim.services] == [None]
    assert await used(connection) == (0, 0, 0)


@pytest.mark.parametrize("period", PERIODS)
async def test_spent_by_our_count(connection: Connection, worker: Peer, period: str) -> None:
    """A service is spent once one of its limits is reached, and one without a limit never is."""
    await add_service(connection, timezone=midweek(), **{f"{period}_limit": 2})
    await add_service(connection, SERVICE + 1, timezone=midweek())
    both = [SERVICE, SERVICE + 1]
    for service in both:
        await add_messages(connection, 3, service_id=service)

    found = []
    for _ in range(2):
        await worker.claim(dict.fromkeys(both, 1))
        found.append(await quota.spent(worker.session, both))

    assert found == [set(), {SERVICE}]


@pytest.mark.parametrize("period", PERIODS)
async def test_spent_by_the_word_of_the_provider(
    connection: Connection, worker: Peer, period: str
) -> None:
    """A service with a closed window is spent, whatever we have counted, until it opens again."""
    await add_service(connection, timezone=midweek())
    await refused(connection, worker, period)

    found = [await quota.spent(worker.session, [SERVICE])]
    await connection.execute("UPDATE quota_usage SET closed_until = now()")
    found.append(await quota.spent(worker.session, [SERVICE]))

    assert found == [{SERVICE}, set()]


async def test_limit_is_told_once(connection: Connection, worker: Peer) -> None:
    """Of many messages refused for the same limit the first one closes the window."""
    await add_service(connection, timezone=midweek())

    assert len(await refused(connection, worker, "day", count=4)) == 1


async def test_closed_window_ends(connection: Connection, worker: Peer) -> None:
    """A closed day is over at midnight, and the service sends again by itself."""
    await add_service(connection)
    await nearing(connection, WEDNESDAY)
    (window,) = await refused(connection, worker, "day")

    claim = await wait_for(lambda: brought(worker), "the next day")

    assert len(claim.sending) == 1
    assert claim.services[0]["now"] >= window["closed_until"].timestamp()


@pytest.mark.parametrize(
    ("period", "weekday", "clock", "until"),
    [
        ("day", WEDNESDAY, time(0, 1), "a minute"),
        ("day", WEDNESDAY, time(0, 4, 30), "a minute"),
        ("day", WEDNESDAY, time(0, 5, 30), "its end"),
        ("week", MONDAY, time(0, 1), "a minute"),
        ("week", MONDAY, time(0, 5, 30), "its end"),
        ("week", WEDNESDAY, time(0, 1), "its end"),
    ],
)
async def test_provider_behind_our_clock(
    connection: Connection, worker: Peer, period: str, weekday: int, clock: time, until: str
) -> None:
    """In the first five minutes of a window a LIMIT_… means a minute's wait, and later its end."""
    await add_service(connection, timezone=zone_where(weekday, clock))

    (window,) = await refused(connection, worker, period)

    waits = await connection.fetchval("SELECT $1 - clock_timestamp()", window["closed_until"])
    assert (timedelta(seconds=30) < waits <= timedelta(seconds=60)) == (until == "a minute")
    assert await worker.ids() == []


async def test_wait_of_a_minute_ends(connection: Connection, worker: Peer) -> None:
    """After the wait the service tries again, and a further refusal closes the window anew."""
    await add_service(connection, timezone=zone_where(WEDNESDAY, time(0, 1)))
    await refused(connection, worker, "day")
    await connection.execute(
        "UPDATE quota_usage SET closed_until = closed_until - interval '1 min'"
    )

    (again,) = (await worker.claim()).sending

    window = await quota.close_window(worker.session, again["id"], again["claim_no"], "day")
    assert window is not None


async def test_refusal_of_an_earlier_window(connection: Connection, worker: Peer) -> None:
    """A LIMIT_DAY for a message of yesterday says nothing about today."""
    await add_service(connection, timezone=midweek())
    await add_message(connection)
    (row,) = (await worker.claim()).sending
    await connection.execute("UPDATE outbox SET claimed_at = claimed_at - interval '1 day'")
    await connection.execute(
        "INSERT INTO quota_usage SELECT service_id, 'day', window_start - interval '1 day' "
        "FROM quota_usage WHERE period = 'day'"
    )

    assert await quota.close_window(worker.session, row["id"], row["claim_no"], "day")
    await add_message(connection)
    assert len(await worker.ids()) == 1


async def test_answer_to_an_older_claim_closes_nothing(
    connection: Connection, worker: Peer
) -> None:
    """An answer that belongs to an older claim of its message closes no window."""
    await add_service(connection, timezone=midweek())
    await add_message(connection)
    (row,) = (await worker.claim()).sending

    assert await quota.close_window(worker.session, row["id"], row["claim_no"] - 1, "day") is None
