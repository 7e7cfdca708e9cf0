"""What a scrape asks of the database, in one statement."""

from __future__ import annotations

from typing import Final

from dispatcher.db.pool import Session
from dispatcher.metrics import Sample

# Tell every gauge by its name and labels. Messages are counted through the partial indexes on live
# states alone, so that finished ones cost nothing.
_GAUGES: Final = """
WITH moment AS MATERIALIZED (
    SELECT now() AS now
),
services AS MATERIALIZED (
    SELECT
        s.service_id, s.service_id::text AS name, s.paused, s.blocked_until IS NOT NULL AS blocked,
        s.timezone, s.day_limit, s.week_limit, s.month_limit, m.now
    FROM service s
    CROSS JOIN moment m
),
pending AS MATERIALIZED (
    SELECT o.service_id, count(*) AS messages
    FROM outbox o
    WHERE o.status = 'pending'
    GROUP BY o.service_id
),
sending AS MATERIALIZED (
    SELECT o.service_id, count(*) AS messages
    FROM outbox o
    WHERE o.status = 'sending'
    GROUP BY o.service_id
),
in_doubt AS MATERIALIZED (
    SELECT o.service_id, count(*) AS messages
    FROM outbox o
    WHERE o.status = 'unknown'
    GROUP BY o.service_id
),
windows AS MATERIALIZED (
    SELECT
        ARRAY[s.name, period.name] AS labels,
        coalesce(q.used, 0) AS used,
        coalesce(q.closed_until > s.now, false) AS closed,
        CASE period.name
            WHEN 'day' THEN s.day_limit
            WHEN 'week' THEN s.week_limit
            ELSE s.month_limit
        END AS most,
        (date_trunc(period.name, s.now AT TIME ZONE s.timezone) + period.length)
            AT TIME ZONE s.timezone AS next
    FROM services s
    CROSS JOIN (
        VALUES ('day', interval '1 day'), ('week', interval '7 days'), ('month', interval '1 month')
    ) AS period (name, length)
    LEFT JOIN quota_usage q
        ON q.service_id = s.service_id
        AND q.period = period.name
        AND q.window_start = date_trunc(period.name, s.now, s.timezone)
)
SELECT 'dispatcher_pending', ARRAY[s.name], coalesce(p.messages, 0)::float8
FROM services s
LEFT JOIN pending p USING (service_id)
UNION ALL
SELECT 'dispatcher_sending', ARRAY[s.name], coalesce(p.messages, 0)
FROM services s
LEFT JOIN sending p USING (service_id)
UNION ALL
SELECT 'dispatcher_in_doubt', ARRAY[s.name], coalesce(p.messages, 0)
FROM services s
LEFT JOIN in_doubt p USING (service_id)
UNION ALL
SELECT
    'dispatcher_oldest_due_age_seconds', ARRAY[s.name],
    coalesce(extract(epoch FROM s.now - (
        WITH RECURSIVE lane AS (
            (
                SELECT o.priority
                FROM outbox o
                WHERE o.status = 'pending' AND o.service_id = s.service_id
                ORDER BY o.priority
                LIMIT 1
            )
            UNION ALL
            SELECT next_lane.priority
            FROM lane
            CROSS JOIN LATERAL (
                SELECT o.priority
                FROM outbox o
                WHERE o.status = 'pending' AND o.service_id = s.service_id
                    AND o.priority > lane.priority
                ORDER BY o.priority
                LIMIT 1
            ) next_lane
        )
        SELECT min(first.due)
        FROM lane
        CROSS JOIN LATERAL (
            SELECT greatest(o.send_after, o.retry_at) AS due
            FROM outbox o
            WHERE o.status = 'pending' AND o.service_id = s.service_id
                AND o.priority = lane.priority
            ORDER BY greatest(o.send_after, o.retry_at), o.id
            LIMIT 1
        ) first
        WHERE first.due <= s.now
    )), 0)
FROM services s
UNION ALL
SELECT 'dispatcher_service_paused', ARRAY[s.name], s.paused::integer
FROM services s
UNION ALL
SELECT 'dispatcher_service_blocked', ARRAY[s.name], s.blocked::integer
FROM services s
UNION ALL
SELECT 'dispatcher_quota_used', w.labels, w.used
FROM windows w
UNION ALL
SELECT 'dispatcher_quota_limit', w.labels, w.most
FROM windows w
WHERE w.most IS NOT NULL
UNION ALL
SELECT 'dispatcher_quota_closed', w.labels, w.closed::integer
FROM windows w
UNION ALL
SELECT
    'dispatcher_quota_next_window_timestamp_seconds', w.labels, extract(epoch FROM w.next)
FROM windows w
UNION ALL
SELECT
    'dispatcher_egress_service_blocked', ARRAY[e.egress, e.service_id::text],
    (e.blocked_until IS NOT NULL)::integer
FROM egress_service e
UNION ALL
SELECT 'dispatcher_egress_banned', ARRAY[e.name], (e.banned_until IS NOT NULL)::integer
FROM egress e
UNION ALL
SELECT 'dispatcher_egress_ill', ARRAY[e.name], (e.ill_until IS NOT NULL)::integer
FROM egress e
UNION ALL
SELECT
    'dispatcher_egress_probe_timestamp_seconds', ARRAY[e.name],
    extract(epoch FROM greatest(e.banned_until, e.ill_until))
FROM egress e
WHERE num_nonnulls(e.banned_until, e.ill_until) > 0
UNION ALL
SELECT
    'dispatcher_workers', ARRAY[e.name],
    (SELECT count(*) FROM worker w WHERE w.egress = e.name AND w.lease_until > m.now)
FROM egress e
CROSS JOIN moment m
UNION ALL
SELECT 'dispatcher_reports_waiting', ARRAY[]::text[], count(*)
FROM delivery_report d
WHERE d.message_id IS NULL AND d.received_at > now() - interval '7 days'
"""


async def read(session: Session) -> list[Sample]:
    """Every gauge of the database. Raises DatabaseLost."""
    rows = await session.fetch(_GAUGES)
    return [Sample(name, tuple(labels), value) for name, labels, value in rows]
