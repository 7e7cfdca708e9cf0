from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dispatcher.domain.message import Status
from dispatcher.domain.outcomes import (
    ANSWERS,
    EXPIRED,
    RELEASED,
    REPLY_LIMIT,
    Outcome,
    Signal,
    classify,
    doubt,
    never_left,
    printable,
    refused,
    tellable,
)

# What the provider's documentation lists, written down here anew: the status that the message
# gets, what is learnt beyond it, whether the request counts as an attempt, whether it costs quota.
TABLE = {
    "MSG_OK": (Status.ACCEPTED, None, True, True),
    "BAN_IP_TEMP": (Status.PENDING, Signal.BANNED, False, False),
    "INVALID_IP": (Status.PENDING, Signal.NOT_ALLOWED, False, False),
    "SERVICE_DISABLED": (Status.PENDING, Signal.DISABLED, False, False),
    "LIMIT_DAY": (Status.PENDING, Signal.DAY_SPENT, False, False),
    "LIMIT_WEEK": (Status.PENDING, Signal.WEEK_SPENT, False, False),
    "LIMIT_MONTH": (Status.PENDING, Signal.MONTH_SPENT, False, False),
    "LIMIT_DELAY": (Status.PENDING, Signal.TOO_SOON, False, False),
    "INVALID_MSISDN": (Status.REJECTED, None, True, False),
    "INVALID_PATTERN": (Status.REJECTED, None, True, False),
    "INVALID_INPUT": (Status.REJECTED, Signal.MALFORMED, True, False),
}
SPACES = st.text(" \t\r\n", max_size=4).map(str.encode)
IDENTIFIERS = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=64
)


def test_table_is_complete() -> None:
    """Every answer of the provider's documentation is known, and no other."""
    assert set(ANSWERS) == set(TABLE)


@pytest.mark.parametrize("answer", TABLE)
def test_answer(answer: str) -> None:
    """Each answer has its status, its signal and its price, and is kept with the message."""
    outcome = classify(200, answer.encode())

    told = (outcome.status, outcome.signal, outcome.counts_attempt, outcome.costs_quota)
    assert told == TABLE[answer]
    assert outcome.reply == answer
    assert outcome.provider_id is None
    assert (outcome.error is None) == (answer == "MSG_OK")
    assert not outcome.in_doubt


@pytest.mark.parametrize("answer", [a for a in TABLE if a != "MSG_OK"])
def test_error_is_one_plain_sentence(answer: str) -> None:
    """What goes wrong is told in a sentence that ends with what to do or what comes."""
    error = ANSWERS[answer].error

    assert error is not None
    assert error[0].isupper()
    assert error.endswith(".")
    assert answer not in error


@given(before=SPACES, answer=st.sampled_from(sorted(TABLE)), after=SPACES)
def test_white_space_around(before: bytes, answer: str, after: bytes) -> None:
    """White space around an answer changes nothing of its meaning."""
    assert classify(200, before + answer.encode() + after) == classify(200, answer.encode())


@given(space=st.text(" \t", max_size=4), identifier=IDENTIFIERS, after=SPACES)
@example(space=" ", identifier="123", after=b"\r\n")
@example(space="", identifier="MSG_OK:1", after=b"")
@example(space="", identifier="x" * 64, after=b"")
def test_identifier(space: str, identifier: str, after: bytes) -> None:
    """An identifier of 1 to 64 printable characters is taken whole, without the white space."""
    outcome = classify(200, f"MSG_OK:{space}{identifier}".encode() + after)

    assert (outcome.status, outcome.provider_id) == (Status.ACCEPTED, identifier)
    assert (outcome.counts_attempt, outcome.costs_quota) == (True, True)
    assert outcome.reply == printable(f"MSG_OK:{space}{identifier}".encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \r\n",
        b"MSG_OKAY",
        b"MSG_OK ok",
        b"MSG_OK 123",
        b"MSG_OK:",
        b"MSG_OK: \r\n",
        b"MSG_OK:1 2",
        b"MSG_OK:1\n2",
        b"MSG_OK:\n1",
        b"MSG_OK :1",
        b"MSG_OK\nMSG_OK",
        b"MSG_OK\0",
        b"\0MSG_OK",
        b"MSG_OK:" + b"x" * 65,
        b"MSG_OK:\x7f",
        "MSG_OK:№1".encode(),
        "\u00a0MSG_OK".encode(),
        "\ufeffMSG_OK".encode(),
        "MSG_ОK".encode(),  # noqa: RUF001 - the O is Cyrillic on purpose
        b"msg_ok",
        b"Msg_Ok:1",
        b"BAN_IP_TEMP:1",
        b"BAN_IP",
        b"LIMIT_HOUR",
        b"LIMIT_DAY LIMIT_WEEK",
        b"INVALID_MSISDN.",
        b"<html>MSG_OK</html>",
        b"\xff\xfe",
    ],
)
def test_strict_otherwise(body: bytes) -> None:
    """What only resembles an answer is in doubt: it counts, and it costs."""
    outcome = classify(200, body)

    assert outcome.in_doubt
    assert (outcome.signal, outcome.provider_id) == (None, None)
    assert (outcome.counts_attempt, outcome.costs_quota) == (True, True)


@given(
    status=st.integers(100, 599).filter(lambda status: status != 200),
    answer=st.sampled_from([*sorted(TABLE), "MSG_OK:1"]),
)
@example(status=201, answer="MSG_OK")
@example(status=302, answer="MSG_OK")
@example(status=500, answer="BAN_IP_TEMP")
def test_only_200_carries_an_answer(status: int, answer: str) -> None:
    """Under any other HTTP status even a good answer is in doubt, and the status is named."""
    outcome = classify(status, answer.encode())

    assert outcome.in_doubt
    assert outcome.signal is None
    assert outcome.reply == answer
    assert str(status) in (outcome.error or "")


@given(body=st.binary(max_size=300))
def test_any_bytes(body: bytes) -> None:
    """Whatever comes, it is an answer of the table or in doubt, and what is kept can be shown."""
    outcome = classify(200, body)

    line = body.strip().decode("latin-1")
    known = line in TABLE or (outcome.provider_id is not None and line.startswith("MSG_OK:"))
    assert outcome.in_doubt == (not known)
    assert outcome.reply is not None
    assert outcome.reply == printable(body)


@given(body=st.binary(max_size=3 * REPLY_LIMIT) | st.text(max_size=3 * REPLY_LIMIT).map(str.encode))
@example(body="я".encode() * 300)
@example(body=b"a\0b\nc\x1b[31m")
def test_printable(body: bytes) -> None:
    """What is kept is at most 200 characters, on one line, and none that PostgreSQL refuses."""
    kept = printable(body)

    assert len(kept) <= REPLY_LIMIT
    assert kept.isprintable()
    assert "\0" not in kept


def test_printable_keeps_what_can_be_read() -> None:
    """Readable text stays as it is; of the rest each character leaves a mark."""
    assert printable(" Грешка: №5 \r\n".encode()) == "Грешка: №5"
    assert printable(b"a\0b\nc") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"
    assert printable("🙂".encode() * 300) == "🙂" * REPLY_LIMIT


def test_doubt_says_where_to_look() -> None:
    """A doubt says that it may have been sent, and which command settles it."""
    assert doubt("No answer came (reset).") == Outcome(
        Status.UNKNOWN,
        error="No answer came (reset). It may have been sent; see 'dispatcher resolve'.",
    )


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (never_left("connection refused"), Status.PENDING),
        (refused("Its own fault."), Status.REJECTED),
        (RELEASED, Status.PENDING),
        (EXPIRED, Status.EXPIRED),
    ],
)
def test_what_did_not_leave_is_free(outcome: Outcome, status: Status) -> None:
    """What certainly did not leave is no attempt and costs no quota."""
    assert outcome.status is status
    assert (outcome.counts_attempt, outcome.costs_quota) == (False, False)
    assert (outcome.reply, outcome.provider_id, outcome.signal) == (None, None, None)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (None, True),
        ("LIMIT_DAY", True),
        ("MSG_OK:359881234567", True),
        ("MSG_OKAY", True),
        ("MSG_OK:", True),
        ("Готово", False),
        ("359881234567", False),
        ("MSG_OK:Your code", False),
        ("<h1>Not found: /send.php?msisdn=359881234567&text=Your%20code</h1>", False),
        ("code", False),
        ("code:", False),
        ("", False),
    ],
)
def test_what_a_log_may_tell(reply: str | None, told: bool) -> None:  # noqa: FBT001 - a case
    """A provider's page could hold the number or the text, so only its words are told."""
    assert tellable(reply, "Your code is 4711") == (reply if told else None)
