"""The line in the log, twice a minute, from which an operator sees how things stand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

import structlog

from dispatcher import clock, logs
from dispatcher.db import gauges
from dispatcher.db.pool import DatabaseLost, Session
from dispatcher.domain.message import Status
from dispatcher.metrics import Sample

INTERVAL: Final = 30.0
"""Seconds between two heartbeats. Source: docs/logs.md."""

log = structlog.stdlib.get_logger()


async def beat(session: Session, egress: str, recorded: Mapping[Status, int]) -> None:
    """Log a heartbeat every 30 seconds until cancelled.

    `recorded` counts this worker's outcomes since its start, by status.
    """
    before: Counter[Status] = Counter()
    since = clock.now()
    while True:
        await asyncio.sleep(INTERVAL)
        try:
            samples = await gauges.read(session)
        except DatabaseLost:
            # Told in the line itself. Of an outage others learn, and these counts may take longer
            # than a statement may: that alone is none.
            samples = []
        now = clock.now()
        fresh = Counter(recorded)
        fresh.subtract(before)
        before, seconds, since = Counter(recorded), now - since, now
        log.info(
            "heartbeat",
            database=bool(samples),
            recorded={status.value: count for status, count in sorted(fresh.items())},
            rate=round(fresh[Status.ACCEPTED] / seconds, 2),
            lines_lost=logs.lines.lost,
            **_told(samples, egress),
        )


def _told(samples: Iterable[Sample], egress: str) -> dict[str, Any]:
    """What the database's gauges say, as fields."""
    totals: Counter[str] = Counter()
    oldest = 0.0
    used: dict[tuple[str, ...], float] = {}
    limits: dict[tuple[str, ...], float] = {}
    closed: set[tuple[str, ...]] = set()
    ours: dict[str, float] = {}
    for sample in samples:
        match sample.name:
            case "dispatcher_pending" | "dispatcher_sending" | "dispatcher_in_doubt":
                totals[sample.name] += int(sample.value)
            case "dispatcher_oldest_due_age_seconds":
                oldest = max(oldest, sample.value)
            case "dispatcher_quota_used":
                used[sample.labels] = sample.value
            case "dispatcher_quota_limit":
                limits[sample.labels] = sample.value
            case "dispatcher_quota_closed" if sample.value:
                closed.add(sample.labels)
            case _ if sample.labels == (egress,):
                ours[sample.name] = sample.value
    return {
        "pending": totals["dispatcher_pending"],
        "sending": totals["dispatcher_sending"],
        "unknown": totals["dispatcher_in_doubt"],
        "oldest_due_seconds": round(oldest, 3),
        "quota_left": {
            f"{service}/{period}": (
                0
                if (service, period) in closed
                else max(0, int(limit - used.get((service, period), 0)))
            )
            for (service, period), limit in sorted(limits.items())
        },
        "banned": bool(ours.get("dispatcher_egress_banned")),
        "ill": bool(ours.get("dispatcher_egress_ill")),
        "workers": int(ours.get("dispatcher_workers", 0)),
    }
