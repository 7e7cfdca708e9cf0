"""Messages that can be told apart at the provider, by a number in their text."""

from __future__ import annotations

from tests.builders import SERVICE
from tests.faults.postgres import Connection

MARK = "Ваучер № "


def text_of(number: int) -> str:
    """The text of the message of a number."""
    return f"{MARK}{number} & още=100% +1"


def number_of(text: str) -> int:
    """The number in a text."""
    number = int(text.removeprefix(MARK).split(" ", 1)[0])
    assert text == text_of(number), "the text was changed on its way"
    return number


async def add_numbered(
    connection: Connection, count: int, *, service_id: int = SERVICE, first: int = 1
) -> None:
    """Insert messages numbered from `first`, each with a recipient of its own."""
    await connection.execute(
        """
        INSERT INTO outbox (service_id, msisdn, text)
        SELECT $1, (359880000000 + n)::text, $2 || n || $3
        FROM generate_series($4::bigint, $5::bigint) AS n
        """,
        service_id,
        MARK,
        text_of(0).removeprefix(f"{MARK}0"),
        first,
        first + count - 1,
    )
