"""The demo's verdict: it must tell when a message was sent twice or got lost."""

from datetime import UTC, datetime
from io import StringIO
from typing import Any, cast

import pytest
from rich.console import Console

from dispatcher.db.demo import Window
from dispatcher.db.pool import Record
from dispatcher.demo import TOTAL, End, _Ban

Rows = list[dict[str, Any]]
SENT = 1300


def rows() -> Rows:
    """All messages: the first ones sent, the others waiting."""
    return [
        {
            "id": number,
            "service_id": 42,
            "msisdn": "447700900001",
            "text": str(number),
            "status": "delivered" if number < SENT else "pending",
        }
        for number in range(TOTAL)
    ]


def log() -> Rows:
    """What the simulator answered: the sent ones accepted, two refused by a ban before."""
    return [
        {"service_id": "42", "msisdn": "447700900001", "text": str(number), "answer": answer}
        for number, answer in (
            (0, "BAN_IP_TEMP"),
            (SENT, "BAN_IP_TEMP"),
            *((number, f"MSG_OK:{number}") for number in range(SENT)),
        )
    ]


def end(messages: Rows, answers: Rows, *, twice: int = 0, **flags: bool) -> End:
    """An end as the demo puts it together."""
    tomorrow = datetime(2030, 1, 1, 22, tzinfo=UTC)
    return End(
        seconds=12.0,
        finished=flags.get("finished", True),
        clean=flags.get("clean", True),
        messages=cast(list[Record], messages),
        days={42: Window(42, SENT, tomorrow, "00:00 Europe/Sofia")},
        ban=_Ban(),
        received={
            "requests": len(answers),
            "accepted": SENT,
            "received_twice": twice,
            "answers": {"MSG_OK": SENT, "BAN_IP_TEMP": 2},
            "services": {},
        },
        log=answers,
    )


def test_good_end() -> None:
    """All that was sent is recorded so and all else waits: nothing twice, nothing lost."""
    assert end(rows(), log()).good
    assert end(rows(), log()).lost == 0


@pytest.mark.parametrize(
    ("number", "status"),
    [(0, "pending"), (1, "unknown"), (2, "rejected"), (SENT, "accepted"), (SENT + 1, "unknown")],
)
def test_outbox_and_simulator_disagree(number: int, status: str) -> None:
    """A message that was accepted and is not recorded so, or the other way round, is lost."""
    messages = rows()
    messages[number]["status"] = status
    assert end(messages, log()).lost == 1
    assert not end(messages, log()).good


def test_a_row_is_gone() -> None:
    """A message that the outbox does not have any more is lost."""
    assert end(rows()[:-3], log()).lost == 3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"finished": False}, "It was not over after 120 seconds."),
        ({"clean": False}, "A worker ended with an error."),
        ({"twice": 1}, "Received twice: 1. Lost: 0."),
    ],
)
def test_bad_end_is_told(flags: dict[str, Any], sentence: str) -> None:
    """An end that is not good says why."""
    bad = end(rows(), log(), **flags)
    shown = StringIO()
    Console(file=shown, width=80).print(bad.shown())
    assert not bad.good
    assert sentence in shown.getvalue()
