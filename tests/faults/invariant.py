"""What must hold after every fault: nothing sent twice, nothing lost, every status true."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Final

from tests.e2e.harness import Running
from tests.faults.postgres import Connection
from tests.faults.provider import Provider
from tests.faults.texts import MARK, number_of

SENT: Final = {"accepted", "enroute", "delivered", "undeliverable"}
COUNTED: Final = SENT | {"unknown"}

_DEBITS = """
SELECT
    o.service_id, period.name AS period,
    date_trunc(period.name, o.claimed_at, s.timezone) AS window_start,
    sum(o.doubts + (o.status = ANY ($1::text[]))::integer)::integer AS used
FROM outbox o
JOIN service s USING (service_id)
CROSS JOIN (VALUES ('day'), ('week'), ('month')) AS period (name)
WHERE o.claimed_at IS NOT NULL
GROUP BY 1, 2, 3
HAVING sum(o.doubts + (o.status = ANY ($1::text[]))::integer) <> 0
ORDER BY 1, 2, 3
"""

_COUNTS = """
SELECT service_id, period, window_start, used FROM quota_usage WHERE used <> 0 ORDER BY 1, 2, 3
"""


async def hold(connection: Connection, provider: Provider, *workers: Running) -> Counter[str]:
    """Check all of it, once leases are over and everything is recorded; returns the statuses.

    A message whose `doubts` say that it was sent again may have come as often again.
    """
    rows = await connection.fetch("SELECT * FROM outbox ORDER BY id")
    numbers = {number_of(row["text"]): row for row in rows}
    assert set(provider.books) <= set(numbers), "the provider got what nobody inserted"
    for number, row in numbers.items():
        entries = provider.books.get(number, [])
        told = f"message {row['id']}: {dict(row)}; at the provider: {entries}"
        booked = [entry for entry in entries if entry.booked]
        in_doubt = [entry for entry in entries if not entry.refused]
        status, again = row["status"], row["doubts"]
        assert len(in_doubt) <= 1 + again, f"sent twice: {told}"
        assert status != "sending", f"left behind: {told}"
        assert all(entry.service_id == row["service_id"] for entry in entries), told
        assert all(entry.msisdn == (row["recipient"] or row["msisdn"]) for entry in entries), told
        if status in SENT:
            assert row["reply"] in {entry.reply for entry in booked}, f"a false success: {told}"
            assert row["reply"] == f"MSG_OK:{row['provider_id']}", told
        elif status != "unknown":
            assert len(in_doubt) <= again, f"sent, and its status does not tell: {told}"
    debits = [tuple(row) for row in await connection.fetch(_DEBITS, sorted(COUNTED))]
    counts = [tuple(row) for row in await connection.fetch(_COUNTS)]
    assert counts == debits, "the quota does not count what was sent and what is in doubt"
    _logs_hold(workers)
    return Counter(row["status"] for row in rows)


def _logs_hold(workers: tuple[Running, ...]) -> None:
    accepted: Counter[int] = Counter()
    for worker in workers:
        for line in (*(json.dumps(e, ensure_ascii=False) for e in worker.events), worker.errors):
            assert MARK not in line, "a text is in the log"
            assert re.search(r"35988\d{4}", line) is None, "a number is in the log"
        accepted.update(event["id"] for event in worker.seen("message.accepted"))
    assert all(count == 1 for count in accepted.values()), "a success is told twice"
