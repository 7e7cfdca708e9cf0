"""Whatever a user writes arrives as it was written, or is refused without a request."""

from __future__ import annotations

from collections import Counter
from typing import Final

from tests.builders import SERVICE, add_service
from tests.e2e.harness import Connection, message, wait_for, worker
from tests.integration.wire.raw_provider import RawProvider

TEXTS: Final = [
    "&service_id=1&msisdn=359000000000",
    "a=b?c#d;e/f\\g|h",
    "100% %00 %0A %26 %zz + ++",
    "line\r\nHost: evil\r\n\r\nGET / HTTP/1.1",
    "tab\tbell\x07 escape\x1b[31m delete\x7f",
    "\u200b\u200d\ufeff\u202eright to left\u2028\u2029",
    "кирилица, Ελληνικά, العربية, 漢字",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e7\U0001f1ec",
    "\U0010ffff\uffff\ue000",
    " spaces at both ends ",
    " ",
    "'; DROP TABLE outbox; --",
    "$1 {x} %s ${HOME} `id`",
    "\U0001f600" * 160,
    "я" * 160,
    "e\u0301" * 80,
]

TOO_LONG_OR_EMPTY: Final = ["", "x" * 161, "\U0001f600" * 161, "e\u0301" * 81, "x" * 1_000_000]

NUMBERS: Final = {
    "359881234567": "359881234567",
    "+359 88 123 4567": "359881234567",
    "00359881234567": "359881234567",
    "0881234567": "359881234567",
    "+359(0)88-123-4567": "359881234567",
    " +359.88.123.4567 ": "359881234567",
    "4915112345678": "4915112345678",
}

NO_NUMBERS: Final = [
    "",
    " ",
    "0",
    "+",
    "123",
    "359",
    "nobody",
    "359881234567&text=x",
    "359881234567\n359881234568",
    "359881234567; DROP TABLE outbox",
    "tel:359881234567;ext=99999",
    "3.59881234567e11",
    "0x53CB7B4C87",
    "999999999999999999999",
    "9" * 100_000,
    "\U0001f4f1" * 50,
    "\u0001",
    "\uff13\uff15\uff19\uff18\uff18\uff11\uff12\uff13\uff14\uff15\uff16\uff17",
    "0881234567/0881234568",
    "+" * 1000,
]

EXTREMES: Final = [("priority", -32768), ("priority", 32767), ("extended", False)]


async def test_hostile(database: str, connection: Connection) -> None:
    """Hostile texts and numbers reach the wire unharmed, once; what cannot be sent is refused."""
    await add_service(connection, user_id=2**63 - 1)
    wanted: Counter[tuple[str, str]] = Counter()
    for text in TEXTS:
        await _insert(connection, "359881234567", text)
        wanted["359881234567", text] += 1
    for written, number in NUMBERS.items():
        await _insert(connection, written, f"to {written}")
        wanted[number, f"to {written}"] += 1
    refused = [
        *[await _insert(connection, "359881234567", text) for text in TOO_LONG_OR_EMPTY],
        *[await _insert(connection, written, "to nobody") for written in NO_NUMBERS],
    ]
    await connection.execute(
        """
        INSERT INTO outbox (service_id, msisdn, text, send_after, created_at, expires_at)
        SELECT $1, '359881234567', 'at ' || at, at::timestamptz, '-infinity', 'infinity'
        FROM unnest(ARRAY['infinity', '-infinity']) AS at
        """,
        SERVICE,
    )
    wanted["359881234567", "at -infinity"] += 1
    for column, value in EXTREMES:
        text = f"{column} {value}"
        await connection.execute(
            f"INSERT INTO outbox (service_id, msisdn, text, {column}) "  # noqa: S608 - ours
            f"VALUES ({SERVICE}, '359881234567', $1, {value})",
            text,
        )
        wanted["359881234567", text] += 1

    async with RawProvider() as provider, worker(database, provider.url) as running:

        async def done() -> bool:
            return not await connection.fetchval(
                "SELECT EXISTS (SELECT FROM outbox WHERE status IN ('pending', 'sending') "
                "AND send_after < 'infinity')"
            )

        await wait_for(done, "all are sent or refused")
        assert await running.stop() == 0
        parameters = [dict(request.parameters) for request in provider.requests]
        assert all(len(request.parameters) in {4, 5} for request in provider.requests)
        got = Counter((told["msisdn"], told["text"]) for told in parameters)
        assert got == wanted
        assert {told["user_id"] for told in parameters} == {str(2**63 - 1)}
        assert {told["service_id"] for told in parameters} == {str(SERVICE)}
        for message_id in refused:
            row = await message(connection, message_id)
            assert (row["status"], row["attempts"]) == ("rejected", 0), dict(row)
            assert row["error"].endswith(".")
        lines = repr(running.events)
        assert "359881234567" not in lines
        assert not any(text in lines for text in TEXTS if len(text) > 2)
    used = await connection.fetchval("SELECT max(used) FROM quota_usage")
    assert used == sum(wanted.values())


async def _insert(connection: Connection, msisdn: str, text: str) -> int:
    found: int = await connection.fetchval(
        "INSERT INTO outbox (service_id, msisdn, text) VALUES ($1, $2, $3) RETURNING id",
        SERVICE,
        msisdn,
        text,
    )
    return found
