"""The outbox: claiming messages, recording what became of them, and taking back what is held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, TypeAlias

import asyncpg
import orjson

from dispatcher.db.pool import Record, Session
from dispatcher.domain.message import Status
from dispatcher.domain.outcomes import Outcome

AT_MOST: Final = 1000
"""Messages that one claim brings; `_CLAIM` has it as a number, which the planner can see."""

HORIZON: Final = 1.0
"""Seconds ahead for which slots of a service with a pace are reserved."""

LEAD: Final = 0.01
"""Seconds from a claim to the first slot it can still meet."""

GUARD: Final = 0.00125
"""Seconds added to every minimum delay, for what a worker's timer may be late and two workers'
reckoning of the clock may differ."""


Head: TypeAlias = tuple[str, int]
"""When a message is due, as PostgreSQL writes it, and the message; the order within a priority."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A service with due messages, and whether it may be asked for them."""

    service_id: int
    may_send: bool
    probe_due: bool
    """Blocked, and the time for one message to try has come."""
    windows_open: bool
    """Whether the rows that count its current windows exist."""
    heads: dict[int, Head] = field(default_factory=dict, compare=False)
    """The first message of each priority."""


# Tell which services have a message that is due, and which of those may send through an egress.
_WAITING = """
WITH RECURSIVE lane AS (
    (
        SELECT o.service_id, o.priority, greatest(o.send_after, o.retry_at) AS first_due, o.id
        FROM outbox o
        WHERE o.status = 'pending'
        ORDER BY o.service_id, o.priority, greatest(o.send_after, o.retry_at), o.id
        LIMIT 1
    )
    UNION ALL
    SELECT next_lane.*
    FROM lane
    CROSS JOIN LATERAL (
        SELECT o.service_id, o.priority, greatest(o.send_after, o.retry_at), o.id
        FROM outbox o
        WHERE o.status = 'pending'
            AND (o.service_id, o.priority) > (lane.service_id, lane.priority)
        ORDER BY o.service_id, o.priority, greatest(o.send_after, o.retry_at), o.id
        LIMIT 1
    ) next_lane
),
due AS (
    SELECT
        lane.service_id,
        array_agg(lane.priority) AS priorities,
        array_agg(lane.first_due::text) AS due,
        array_agg(lane.id) AS ids
    FROM lane
    GROUP BY lane.service_id
    HAVING min(lane.first_due) <= clock_timestamp()
)
SELECT
    s.service_id,
    NOT s.paused AND s.blocked_until IS NULL AND here.blocked_until IS NULL AS may_send,
    NOT s.paused
        AND coalesce(s.blocked_until, here.blocked_until) IS NOT NULL
        AND coalesce(s.blocked_until <= clock_timestamp(), true)
        AND coalesce(here.blocked_until <= clock_timestamp(), true) AS probe_due,
    p.service_id IS NOT NULL AND 3 = (
        SELECT count(*)
        FROM (VALUES ('day'), ('week'), ('month')) AS period (name)
        JOIN quota_usage q
            ON q.service_id = s.service_id
            AND q.period = period.name
            AND q.window_start = date_trunc(period.name, clock_timestamp(), s.timezone)
    ) AS windows_open,
    due.priorities,
    due.due,
    due.ids
FROM due
JOIN service s USING (service_id)
LEFT JOIN pace p USING (service_id)
LEFT JOIN egress_service here ON here.service_id = s.service_id AND here.egress = $1
ORDER BY s.service_id
"""


async def waiting(session: Session, egress: str) -> list[Waiting]:
    """Services with due messages, in the order of their numbers. Raises DatabaseLost."""
    rows = await session.fetch(_WAITING, egress)
    return [
        Waiting(
            row["service_id"],
            row["may_send"],
            row["probe_due"],
            row["windows_open"],
            heads_in(row),
        )
        for row in rows
    ]


def heads_in(row: Record) -> dict[int, Head]:
    """Where claims of a service may begin, by priority: what a survey found or a claim ended at."""
    return dict(zip(row["priorities"], zip(row["due"], row["ids"], strict=True), strict=True))


# The array of ids in an UPDATE keeps the planner, which cannot know how few there are, from reading
# the whole table for them; a time that is compared with an index is that of the statement, for
# clock_timestamp() is volatile, and PostgreSQL would look at every entry.

# Claim up to so many messages of each service: lock the service's pace and windows, pick what is
# due, refuse what must not go, debit the windows and reserve the slots. $1 worker, $2 services,
# $3 places, $4 even while the egress is closed, $5 even while the service is blocked,
# $6 horizon, $7 lead and $8 guard in seconds; $9 services, $10 priorities, $11 and $12 where
# to begin with the two, a message by when it is due and which it is: while another session holds
# an old snapshot the entries of what was claimed stay in the index, and a claim would pass all.
_CLAIM = r"""
WITH moment AS MATERIALIZED (
    SELECT clock_timestamp() AS now, e.name AS egress, e.ban_episode
    FROM worker w
    JOIN egress e ON e.name = w.egress
    WHERE w.id = $1
        AND w.lease_until > clock_timestamp()
        AND ($4 OR (e.banned_until IS NULL AND e.ill_until IS NULL))
),
head AS MATERIALIZED (
    SELECT h.service_id, h.priority, h.due::timestamptz AS due, h.id
    FROM unnest($9::bigint[], $10::smallint[], $11::text[], $12::bigint[])
        AS h (service_id, priority, due, id)
),
asked AS MATERIALIZED (
    SELECT
        s.service_id, s.user_id, s.patterns, a.places, m.now, m.ban_episode,
        s.day_limit, s.week_limit, s.month_limit,
        date_trunc('day', m.now, s.timezone) AS day_start,
        date_trunc('week', m.now, s.timezone) AS week_start,
        date_trunc('month', m.now, s.timezone) AS month_start,
        CASE WHEN num_nonnulls(s.day_limit, s.week_limit, s.month_limit) > 0 THEN
            (date_trunc('day', m.now AT TIME ZONE s.timezone) + interval '1 day')
            AT TIME ZONE s.timezone
        END AS send_before,
        extract(epoch FROM s.min_delay)::float8 AS min_delay
    FROM moment m
    CROSS JOIN unnest($2::bigint[], $3::integer[]) AS a (service_id, places)
    JOIN service s USING (service_id)
    LEFT JOIN egress_service here ON here.service_id = s.service_id AND here.egress = m.egress
    WHERE NOT s.paused
        AND ($5 OR (s.blocked_until IS NULL AND here.blocked_until IS NULL))
),
locked AS MATERIALIZED (
    SELECT
        a.service_id,
        CASE WHEN d.closed_until > a.now THEN 0 ELSE a.day_limit - d.used END AS day_left,
        CASE WHEN w.closed_until > a.now THEN 0 ELSE a.week_limit - w.used END AS week_left,
        CASE WHEN m.closed_until > a.now THEN 0 ELSE a.month_limit - m.used END AS month_left,
        greatest(d.closed_until, w.closed_until, m.closed_until) > a.now AS closed,
        greatest(p.next_slot, a.now + make_interval(secs => $7)) AS first_slot,
        CASE WHEN a.min_delay > 0 OR p.extra_delay > '0' THEN
            a.min_delay + extract(epoch FROM p.extra_delay)::float8
        END AS delay,
        a.min_delay + extract(epoch FROM p.extra_delay)::float8
            + CASE WHEN a.min_delay > 0 THEN $8::float8 ELSE 0 END AS step
    FROM asked a
    JOIN pace p USING (service_id)
    JOIN quota_usage d ON (d.service_id, d.period, d.window_start)
        = (a.service_id, 'day', a.day_start)
    JOIN quota_usage w ON (w.service_id, w.period, w.window_start)
        = (a.service_id, 'week', a.week_start)
    JOIN quota_usage m ON (m.service_id, m.period, m.window_start)
        = (a.service_id, 'month', a.month_start)
    ORDER BY a.service_id
    FOR NO KEY UPDATE OF p, d, w, m
),
allowed AS MATERIALIZED (
    SELECT
        a.*, l.day_left, l.week_left, l.month_left, l.closed, l.first_slot, l.delay, l.step,
        greatest(0, least(a.places, s.quota_left, s.slots)) AS places_allowed,
        s.slots < least(a.places, s.quota_left) AS slots_short
    FROM locked l
    JOIN asked a USING (service_id)
    CROSS JOIN LATERAL (
        SELECT
            least(l.day_left, l.week_left, l.month_left) AS quota_left,
            CASE WHEN l.delay IS NOT NULL THEN floor(greatest(-1, extract(
            epoch FROM a.now + make_interval(secs => $6) - l.first_slot)::float8 / l.step
        ))::integer + 1 END AS slots
    ) s
),
picked AS MATERIALIZED (
    SELECT a.service_id, a.now, a.patterns, a.first_slot, a.step, o.*
    FROM allowed a
    CROSS JOIN LATERAL (
        WITH RECURSIVE lane AS (
            (
                SELECT o.priority
                FROM outbox o
                WHERE o.status = 'pending' AND o.service_id = a.service_id
                ORDER BY o.priority DESC
                LIMIT 1
            )
            UNION ALL
            SELECT next_lane.priority
            FROM lane
            CROSS JOIN LATERAL (
                SELECT o.priority
                FROM outbox o
                WHERE o.status = 'pending' AND o.service_id = a.service_id
                    AND o.priority < lane.priority
                ORDER BY o.priority DESC
                LIMIT 1
            ) next_lane
        )
        SELECT
            first.id, first.msisdn, first.text, first.expires_at, first.doubts, first.number,
            lane.priority, first.due, row_number() OVER () AS turn
        FROM lane
        LEFT JOIN head h ON h.service_id = a.service_id AND h.priority = lane.priority
        CROSS JOIN LATERAL (
            SELECT
                o.id, o.msisdn, o.text, o.expires_at, o.doubts,
                greatest(o.send_after, o.retry_at) AS due,
                coalesce(o.recipient, substring(o.msisdn FROM '^[1-9][0-9]{9,14}$')) AS number
            FROM outbox o
            WHERE o.status = 'pending'
                AND o.service_id = a.service_id
                AND o.priority = lane.priority
                AND greatest(o.send_after, o.retry_at) <= a.now
                AND (greatest(o.send_after, o.retry_at), o.id)
                    >= (coalesce(h.due, '-infinity'), coalesce(h.id, 0))
            ORDER BY greatest(o.send_after, o.retry_at), o.id
            LIMIT a.places_allowed
            FOR NO KEY UPDATE SKIP LOCKED
        ) first
        LIMIT a.places_allowed
    ) o
    -- A bound that the planner can see, or it takes a tenth of the table for picked.
    LIMIT 1000
),
judged AS MATERIALIZED (
    SELECT
        p.*,
        CASE
            WHEN p.expires_at <= p.now AND p.doubts > 0 THEN 'unknown'
            WHEN p.expires_at <= p.now THEN 'expired'
            WHEN refusal.error IS NOT NULL THEN 'rejected'
            WHEN p.number IS NOT NULL THEN 'sending'
        END AS verdict,
        CASE
            WHEN p.expires_at <= p.now AND p.doubts > 0
            THEN 'It may have been sent; its expires_at passed before it could go again.'
            WHEN p.expires_at <= p.now THEN 'Its expires_at passed before it could be sent.'
            ELSE refusal.error
        END AS error
    FROM picked p
    CROSS JOIN LATERAL (
        SELECT CASE
            WHEN p.text = '' THEN 'The text is empty; write one.'
            WHEN length(p.text) > 160 THEN format(
                'The text has %s characters; the provider takes at most 160.', length(p.text))
            WHEN p.patterns IS NOT NULL AND NOT EXISTS (
                SELECT FROM unnest(p.patterns) AS pattern
                WHERE p.text ~ dispatcher_whole_pattern(pattern)
            ) THEN 'The text matches none of the service''s patterns; change one of them.'
        END AS error
    ) refusal
),
ended AS (
    SELECT
        l.service_id,
        array_agg(l.priority) AS priorities,
        array_agg(l.due::text) AS due,
        array_agg(l.id) AS ids
    FROM (
        SELECT DISTINCT ON (p.service_id, p.priority) p.service_id, p.priority, p.due, p.id
        FROM picked p
        ORDER BY p.service_id, p.priority, p.turn DESC
    ) l
    GROUP BY l.service_id
),
sendable AS MATERIALIZED (
    SELECT
        j.id,
        row_number() OVER turn AS place,
        j.first_slot + make_interval(secs => j.step) * (row_number() OVER turn - 1) AS slot
    FROM judged j
    WHERE j.verdict = 'sending'
    WINDOW turn AS (PARTITION BY j.service_id ORDER BY j.turn)
),
written AS (
    UPDATE outbox o
    SET status = j.verdict,
        status_at = j.now,
        error = j.error,
        claim_no = o.claim_no + (j.verdict = 'sending')::integer,
        worker_id = CASE WHEN j.verdict = 'sending' THEN $1 ELSE o.worker_id END,
        claimed_at = CASE WHEN j.verdict = 'sending' THEN j.now ELSE o.claimed_at END
    FROM judged j
    WHERE o.id = j.id AND j.verdict IS NOT NULL AND o.id = ANY (ARRAY(SELECT k.id FROM judged k))
    RETURNING
        o.id, o.service_id, o.status, o.claim_no, j.number, o.msisdn, o.text, o.extended,
        o.attempts, o.failures, o.doubts, o.expires_at, o.error
),
taken AS MATERIALIZED (
    SELECT w.service_id, count(*)::integer AS messages
    FROM written w
    WHERE w.status = 'sending'
    GROUP BY w.service_id
),
debited AS (
    UPDATE quota_usage q
    SET used = q.used + t.messages
    FROM taken t
    JOIN asked a USING (service_id)
    WHERE q.service_id = t.service_id
        AND (q.period, q.window_start) IN (
            ('day', a.day_start), ('week', a.week_start), ('month', a.month_start))
),
reserved AS (
    UPDATE pace p
    SET next_slot = a.first_slot + make_interval(secs => a.step) * t.messages
    FROM taken t
    JOIN allowed a USING (service_id)
    WHERE p.service_id = t.service_id AND a.delay IS NOT NULL
)
SELECT
    'message' AS kind, w.service_id, w.id, w.status, w.claim_no, w.number, w.msisdn, w.text,
    w.extended, w.attempts, w.failures, w.doubts, w.error,
    extract(epoch FROM w.expires_at)::float8 AS expires,
    extract(epoch FROM CASE WHEN a.delay IS NOT NULL THEN s.slot END)::float8 AS slot, s.place,
    NULL::float8 AS now, NULL::bigint AS user_id, NULL::bigint AS ban_episode,
    NULL::float8 AS delay, NULL::float8 AS send_before, NULL AS spent,
    NULL::boolean AS slots_short,
    NULL::smallint[] AS priorities, NULL::text[] AS due, NULL::bigint[] AS ids
FROM written w
JOIN allowed a USING (service_id)
LEFT JOIN sendable s USING (id)
UNION ALL
SELECT
    'unread', j.service_id, j.id, NULL, NULL, NULL, j.msisdn, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL
FROM judged j
WHERE j.verdict IS NULL
UNION ALL
SELECT
    'service', a.service_id, NULL, NULL, NULL, NULL, NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL,
    extract(epoch FROM greatest(a.first_slot, p.next_slot))::float8, a.places_allowed,
    extract(epoch FROM a.now)::float8, a.user_id, a.ban_episode, a.delay,
    extract(epoch FROM a.send_before)::float8,
    CASE
        WHEN a.closed THEN NULL
        WHEN a.day_left <= coalesce(t.messages, 0) THEN 'day'
        WHEN a.week_left <= coalesce(t.messages, 0) THEN 'week'
        WHEN a.month_left <= coalesce(t.messages, 0) THEN 'month'
    END, a.slots_short, ended.priorities, ended.due, ended.ids
FROM allowed a
JOIN pace p USING (service_id)
LEFT JOIN taken t USING (service_id)
LEFT JOIN ended USING (service_id)
ORDER BY kind, service_id, place
"""


@dataclass(slots=True)
class Claim:
    """What one claim brought: rows as the statement returned them, by their kind."""

    sending: list[Record]
    """Claimed, debited, and with their slot: to be sent."""
    refused: list[Record]
    """Recorded as `expired`, `rejected` or again as `unknown`, without a request."""
    unread: list[Record]
    """Left as they were: their number has to be read first."""
    services: list[Record]
    """What is common to the messages of each service that was asked, and what holds it: its quota
    left, its slots; and its last messages, from which a claim may go on if there are more."""


class ClaimRefused(Exception):
    """The database cannot run a claim for what is in the rows of a service it was asked for."""

    def __init__(self, sqlstate: str | None) -> None:
        super().__init__(f"the claim failed with SQLSTATE {sqlstate}")
        self.sqlstate = sqlstate


async def claim(
    session: Session,
    worker_id: int,
    places: Mapping[int, int],
    *,
    heads: Mapping[int, Mapping[int, Head]] = MappingProxyType({}),
    probe_egress: bool = False,
    probe_service: bool = False,
) -> Claim:
    """Claim up to the given number of messages of each service, AT_MOST in all.

    `heads`: where to begin, by service; what is due earlier is left to the next survey.

    Raises DatabaseLost, and then the claim may stand; `held` finds it. Raises ClaimRefused, and
    then nothing is claimed.
    """
    lanes = [
        (service, priority, *head)
        for service in places
        for priority, head in heads.get(service, {}).items()
    ]
    try:
        rows = await session.fetch(
            _CLAIM,
            worker_id,
            list(places),
            list(places.values()),
            probe_egress,
            probe_service,
            HORIZON,
            LEAD,
            GUARD,
            *([lane[column] for lane in lanes] for column in range(4)),
        )
    except (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError) as error:
        raise ClaimRefused(error.sqlstate) from None
    found = Claim([], [], [], [])
    for row in rows:
        match row["kind"], row["status"]:
            case "message", Status.SENDING:
                found.sending.append(row)
            case "message", _:
                found.refused.append(row)
            case "unread", _:
                found.unread.append(row)
            case _:
                found.services.append(row)
    return found


# Keep the numbers that were read, and refuse what is not a number; one that was put right
# meanwhile is read anew.
_READ = """
UPDATE outbox o
SET recipient = r.recipient,
    status = CASE WHEN r.recipient IS NULL THEN 'rejected' ELSE o.status END,
    status_at = CASE WHEN r.recipient IS NULL THEN clock_timestamp() ELSE o.status_at END,
    error = CASE WHEN r.recipient IS NULL
        THEN 'The number is not one that can be dialled; correct it.' ELSE o.error END
FROM unnest($1::bigint[], $2::text[], $3::text[]) AS r (id, msisdn, recipient)
WHERE o.id = r.id AND o.msisdn = r.msisdn AND o.status = 'pending'
RETURNING o.id, o.service_id, o.status, o.msisdn, o.attempts, o.error
"""


async def read_numbers(
    session: Session, numbers: Mapping[tuple[int, str], str | None]
) -> list[Record]:
    """Write the international number of each (message, number as written); None refuses it.

    Returns the rows that were refused. Raises DatabaseLost.
    """
    rows = await session.fetch(
        _READ,
        [message_id for message_id, _ in numbers],
        [written for _, written in numbers],
        list(numbers.values()),
    )
    return [row for row in rows if row["status"] == Status.REJECTED]


# Not frozen: one is made for each message, and freezing takes half of that time.
@dataclass(slots=True)
class Result:
    """What became of one claimed message, ready to be recorded."""

    id: int
    claim_no: int
    worker_id: int
    service_id: int
    outcome: Outcome
    retry_in: float | None = None
    """Seconds until it may be claimed again, for one that goes back."""
    failed: bool = False
    """Whether the request never left for a fault of the way there."""
    sent_ago: float | None = None
    """Seconds since its first byte left; None if none did."""
    seconds: float = 0.0
    """From the first byte to the whole answer, or to giving up."""


# Record results, each by the claim it belongs to; give back what costs no quota; keep the attempt.
# A claim that is no longer the row's last, or already recorded, changes nothing.
_RECORD = """
WITH result AS MATERIALIZED (
    SELECT *
    FROM json_to_recordset($1) AS r (
        id bigint, claim_no integer, worker_id bigint,
        status text, reply text, provider_id text, error text,
        counted boolean, refunded boolean, failed boolean,
        retry_in float8, sent_ago float8, seconds float8
    )
),
recorded AS (
    UPDATE outbox o
    SET status = CASE
            -- A doubt that comes late tells nothing new.
            WHEN r.status = 'unknown' AND o.status <> 'sending' THEN o.status
            WHEN r.status <> 'pending' THEN r.status
            WHEN o.cancel THEN 'cancelled'
            WHEN o.status IN ('cancelled', 'expired') THEN o.status
            ELSE 'pending'
        END,
        status_at = CASE WHEN o.status = 'sending' THEN clock_timestamp() ELSE o.status_at END,
        attempts = o.attempts + r.counted::integer - (o.status <> 'sending')::integer,
        reply = coalesce(r.reply, o.reply),
        provider_id = r.provider_id,
        error = CASE
            WHEN r.status = 'unknown' AND o.status NOT IN ('sending', 'unknown') THEN o.error
            ELSE r.error
        END,
        retry_at = clock_timestamp() + make_interval(secs => r.retry_in),
        failures = CASE WHEN r.failed THEN least(o.failures + 1, 1000) ELSE 0 END,
        worker_id = NULL,
        accepted_at = CASE WHEN r.status = 'accepted' THEN clock_timestamp() END
    FROM result r
    WHERE o.id = r.id AND o.claim_no = r.claim_no AND o.worker_id = r.worker_id
        AND o.id = ANY (ARRAY(SELECT k.id FROM result k))
    RETURNING
        o.id, o.claim_no, o.service_id, o.claimed_at, r.worker_id, r.status, r.reply, r.error,
        r.refunded, r.sent_ago, r.seconds,
        o.accepted_at - greatest(o.created_at, o.send_after) AS accepted_after
),
touched AS MATERIALIZED (
    SELECT p.service_id, p.extra_delay, n.accepted
    FROM pace p
    JOIN (
        SELECT
            r.service_id,
            count(*) FILTER (WHERE r.status = 'accepted') AS accepted,
            bool_or(r.refunded) AS refunded
        FROM recorded r
        GROUP BY r.service_id
    ) n USING (service_id)
    WHERE n.refunded OR p.extra_delay > '0'
    ORDER BY p.service_id
    FOR NO KEY UPDATE OF p
),
refunded AS (
    UPDATE quota_usage q
    SET used = greatest(0, q.used - f.messages)
    FROM (
        SELECT
            r.service_id, period.name AS period,
            date_trunc(period.name, r.claimed_at, s.timezone) AS window_start,
            count(*)::integer AS messages
        FROM recorded r
        JOIN touched USING (service_id)
        JOIN service s USING (service_id)
        CROSS JOIN (VALUES ('day'), ('week'), ('month')) AS period (name)
        WHERE r.refunded
        GROUP BY 1, 2, 3
    ) f
    WHERE (q.service_id, q.period, q.window_start) = (f.service_id, f.period, f.window_start)
),
hastened AS (
    UPDATE pace p
    SET extra_delay = CASE
            WHEN t.extra_delay > interval '50 microseconds'
            THEN t.extra_delay * power($2::float8, t.accepted) ELSE '0'
        END
    FROM touched t
    WHERE p.service_id = t.service_id AND t.extra_delay > '0' AND t.accepted > 0
),
kept AS (
    INSERT INTO attempt (
        message_id, claim_no, worker_id, sent_at, seconds, outcome, reply, error)
    SELECT
        r.id, r.claim_no, r.worker_id, clock_timestamp() - make_interval(secs => r.sent_ago),
        r.seconds, r.status, r.reply, r.error
    FROM recorded r
    WHERE r.sent_ago IS NOT NULL
)
SELECT r.id, r.claim_no, extract(epoch FROM r.accepted_after)::float8 AS accepted_after
FROM recorded r
"""

DECAY: Final = 0.99
"""By this a service's extra delay shrinks with each accepted message."""


async def record(
    session: Session, results: Sequence[Result]
) -> dict[tuple[int, int], float | None]:
    """Record results, once each however often it is called. Raises DatabaseLost.

    Returns those (message, claim number) that were written by this call, each with the seconds
    from when it was due to its acceptance.
    """
    rows = await session.fetch(
        _RECORD,
        # Thirteen arrays would take the driver twice as long to write.
        orjson.dumps(
            [
                {
                    "id": r.id,
                    "claim_no": r.claim_no,
                    "worker_id": r.worker_id,
                    "status": r.outcome.status,
                    "reply": r.outcome.reply,
                    "provider_id": r.outcome.provider_id,
                    "error": r.outcome.error,
                    "counted": r.outcome.counts_attempt,
                    "refunded": not r.outcome.costs_quota,
                    "failed": r.failed,
                    "retry_in": r.retry_in,
                    "sent_ago": r.sent_ago,
                    "seconds": r.seconds,
                }
                for r in results
            ]
        ).decode(),
        DECAY,
    )
    return {(row["id"], row["claim_no"]): row["accepted_after"] for row in rows}


# List what a worker's claims hold, and if $2 says so what was rescued from it.
_HELD = """
SELECT o.id, o.claim_no, o.service_id
FROM outbox o
WHERE o.status = 'sending' AND o.worker_id = $1
UNION ALL
SELECT o.id, o.claim_no, o.service_id
FROM outbox o
WHERE $2 AND o.status = 'unknown' AND o.worker_id = $1
"""


async def held(session: Session, worker_id: int, *, rescued: bool = False) -> list[Record]:
    """The messages that a worker owns as (id, claim_no, service_id). Raises DatabaseLost.

    `rescued`: also those that others found in doubt while it was silent.
    """
    return await session.fetch(_HELD, worker_id, rescued)


# Look at the clock.
_NOW = """
SELECT clock_timestamp()
"""

# Mark in doubt what is held by workers that are silent past their lease, unless $1 is long ago.
_RESCUE = """
WITH gone AS MATERIALIZED (
    -- Locked, so that a beat at the same moment either comes first or learns that it came late.
    SELECT w.id
    FROM worker w
    WHERE w.lease_until < clock_timestamp()
        AND pg_postmaster_start_time() < clock_timestamp() - w.lease
        -- What keeps back this statement may have kept back beats as well.
        AND clock_timestamp() < $1::timestamptz + w.lease / 2
        AND EXISTS (SELECT FROM outbox o WHERE o.status = 'sending' AND o.worker_id = w.id)
    FOR NO KEY UPDATE SKIP LOCKED
),
stranded AS MATERIALIZED (
    SELECT o.id
    FROM outbox o
    WHERE o.status = 'sending'
        AND (
            o.worker_id IN (SELECT g.id FROM gone g)
            OR NOT EXISTS (SELECT FROM worker w WHERE w.id = o.worker_id)
        )
    LIMIT 1000
    FOR NO KEY UPDATE OF o SKIP LOCKED
)
UPDATE outbox o
SET status = 'unknown',
    status_at = clock_timestamp(),
    attempts = o.attempts + 1,
    retry_at = NULL,
    error = 'The worker that held it is gone. It may have been sent; see ''dispatcher resolve''.'
WHERE o.id = ANY (ARRAY(SELECT s.id FROM stranded s))
RETURNING
    o.id, o.service_id, o.status, o.msisdn, o.text, o.worker_id, o.attempts, o.reply, o.error
"""


async def rescue(session: Session) -> list[Record]:
    """Take the messages of workers that are gone; at most 1000 at a time. Raises DatabaseLost.

    They keep their claim, so an answer that the worker brings after all is still recorded. A
    statement that came so late that those who live could not beat meanwhile takes nothing.
    """
    ((asked_at,),) = await session.fetch(_NOW)
    return await session.fetch(_RESCUE, asked_at)


# Send again what is in doubt, for services that want it so.
_RETRY_UNKNOWN = """
WITH again AS MATERIALIZED (
    SELECT o.id
    FROM service s
    JOIN outbox o ON o.service_id = s.service_id AND o.status = 'unknown'
    WHERE s.on_unknown = 'retry'
        AND o.status_at <= statement_timestamp() - make_interval(secs => $1)
        AND o.doubts < $2
        AND NOT o.cancel
        AND (o.expires_at IS NULL OR o.expires_at > statement_timestamp())
    LIMIT 1000
    FOR NO KEY UPDATE OF o SKIP LOCKED
)
UPDATE outbox o
SET status = 'pending',
    status_at = clock_timestamp(),
    doubts = o.doubts + 1,
    retry_at = NULL
WHERE o.id = ANY (ARRAY(SELECT a.id FROM again a))
RETURNING o.id, o.service_id, o.status, o.msisdn, o.text, o.attempts, o.reply, o.error
"""

RETRIES_OF_UNKNOWN: Final = 3
"""How often a message in doubt is sent again by itself. Source: the meaning of `on_unknown`."""


async def retry_unknown(session: Session, after: float) -> list[Record]:
    """Give back messages in doubt for `after` seconds, where the service says so.

    Raises DatabaseLost.
    """
    return await session.fetch(_RETRY_UNKNOWN, after, RETRIES_OF_UNKNOWN)


# End what ran out while it waited, also in services that are paused or blocked. What was in doubt
# before is so again.
_EXPIRE = """
WITH late AS MATERIALIZED (
    SELECT o.id
    FROM outbox o
    WHERE o.status = 'pending' AND o.expires_at <= statement_timestamp()
    ORDER BY o.expires_at
    LIMIT 1000
    FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE outbox o
SET status = CASE WHEN o.doubts > 0 THEN 'unknown' ELSE 'expired' END,
    status_at = clock_timestamp(),
    error = CASE
        WHEN o.doubts > 0
        THEN 'It may have been sent; its expires_at passed before it could go again.'
        ELSE 'Its expires_at passed before it could be sent.'
    END
WHERE o.id = ANY (ARRAY(SELECT l.id FROM late l))
RETURNING o.id, o.service_id, o.status, o.msisdn, o.text, o.attempts, o.reply, o.error
"""


async def expire(session: Session) -> list[Record]:
    """End messages whose `expires_at` has passed; at most 1000 at a time. Raises DatabaseLost."""
    return await session.fetch(_EXPIRE)
