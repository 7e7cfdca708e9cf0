"""The provider's answers and what each one means. This table is the only place that knows.

Source: SMSPAY's description of its bulk service, as told in docs/configuration.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum, auto
from typing import Final, NamedTuple

from dispatcher.domain.message import Status

REPLY_LIMIT: Final = 200
"""Characters of an answer that are kept with a message."""


class Signal(Enum):
    """What an answer tells beyond the one message it answers."""

    BANNED = auto()
    """Our IP address is banned for a while."""
    NOT_ALLOWED = auto()
    """The service does not know our IP address."""
    DISABLED = auto()
    """The service was stopped."""
    DAY_SPENT = auto()
    WEEK_SPENT = auto()
    MONTH_SPENT = auto()
    TOO_SOON = auto()
    """Sent before the service's minimum delay was over."""
    MALFORMED = auto()
    """Parameters missing or inconsistent: more likely our setting than this message."""


class Outcome(NamedTuple):
    """What becomes of a message, from its answer or the lack of one."""

    status: Status
    signal: Signal | None = None
    reply: str | None = None
    provider_id: str | None = None
    error: str | None = None
    counts_attempt: bool = True
    """Whether the request adds to the message's `attempts`."""
    costs_quota: bool = True
    """Whether what was debited for it stays debited."""

    @property
    def in_doubt(self) -> bool:
        """Whether the request may have reached the provider without a usable answer."""
        return self.status is Status.UNKNOWN


def _back(signal: Signal, error: str) -> Outcome:
    return Outcome(Status.PENDING, signal, error=error, counts_attempt=False, costs_quota=False)


def _rejected(error: str, signal: Signal | None = None) -> Outcome:
    return Outcome(Status.REJECTED, signal, error=error, costs_quota=False)


ANSWERS: Final[Mapping[str, Outcome]] = {
    "MSG_OK": Outcome(Status.ACCEPTED),
    "BAN_IP_TEMP": _back(
        Signal.BANNED, "The provider has banned our IP address for a while; it goes out later."
    ),
    "INVALID_IP": _back(
        Signal.NOT_ALLOWED, "The service does not allow our IP address; ask the provider to add it."
    ),
    "SERVICE_DISABLED": _back(
        Signal.DISABLED, "The provider has stopped the service; ask the provider to start it."
    ),
    "LIMIT_DAY": _back(
        Signal.DAY_SPENT,
        "The provider says that the daily limit of the service is spent; it waits.",
    ),
    "LIMIT_WEEK": _back(
        Signal.WEEK_SPENT,
        "The provider says that the weekly limit of the service is spent; it waits.",
    ),
    "LIMIT_MONTH": _back(
        Signal.MONTH_SPENT,
        "The provider says that the monthly limit of the service is spent; it waits.",
    ),
    "LIMIT_DELAY": _back(
        Signal.TOO_SOON, "It came too soon after the previous message; it is sent again soon."
    ),
    "INVALID_MSISDN": _rejected("The provider does not take the number; correct it."),
    "INVALID_PATTERN": _rejected(
        "The text matches none of the service's templates at the provider; correct it."
    ),
    "INVALID_INPUT": _rejected(
        "The provider found the request's parameters missing or inconsistent; check the "
        "service's user_id and service_id.",
        Signal.MALFORMED,
    ),
}

_ACCEPTED_WITH_ID: Final = re.compile(r"MSG_OK:[ \t]*([\x21-\x7e]{1,64})")


def classify(status: int, body: bytes) -> Outcome:
    """Tell what a whole HTTP answer means; anything outside the table is in doubt."""
    reply = printable(body)
    if status != 200:
        return doubt(f"The provider answered with HTTP status {status}.", reply)
    line = body.strip().decode("ascii", "replace")
    known = ANSWERS.get(line)
    if known is not None:
        return known._replace(reply=reply)
    accepted = _ACCEPTED_WITH_ID.fullmatch(line)
    if accepted is not None:
        return Outcome(Status.ACCEPTED, reply=reply, provider_id=accepted[1])
    return doubt("The provider's answer is none of those it may give.", reply)


def doubt(reason: str, reply: str | None = None) -> Outcome:
    """A request that may have reached the provider and brought no usable answer."""
    return Outcome(
        Status.UNKNOWN,
        reply=reply,
        error=f"{reason} It may have been sent; see 'dispatcher resolve'.",
    )


def never_left(reason: str) -> Outcome:
    """A request of which certainly not one byte left."""
    return Outcome(
        Status.PENDING,
        error=f"The request did not leave ({reason}); it is tried again.",
        counts_attempt=False,
        costs_quota=False,
    )


def refused(error: str) -> Outcome:
    """A message that we do not send, for a reason of our own."""
    return Outcome(Status.REJECTED, error=error, counts_attempt=False, costs_quota=False)


RELEASED: Final = Outcome(Status.PENDING, counts_attempt=False, costs_quota=False)
"""Claimed and given back untouched."""

EXPIRED: Final = Outcome(
    Status.EXPIRED,
    error="Its expires_at passed before it could be sent.",
    counts_attempt=False,
    costs_quota=False,
)

EXPIRED_IN_DOUBT: Final = EXPIRED._replace(
    status=Status.UNKNOWN,
    error="It may have been sent; its expires_at passed before it could go again.",
)
"""The same for a message that was in doubt before."""


_WORD: Final = re.compile(r"[A-Za-z_]{1,40}:?")


def tellable(reply: str | None, text: str) -> str | None:
    """An answer as a log may tell it: one of the table's, or a word that `text` does not have.

    Anything else, as the page of a proxy, could hold the number or the text.
    """
    if reply is None or reply in ANSWERS or _ACCEPTED_WITH_ID.fullmatch(reply):
        return reply
    return reply if _WORD.fullmatch(reply) and reply.rstrip(":") not in text else None


def printable(body: bytes) -> str:
    """The answer as kept with the message: cut, and with a mark for what cannot be shown."""
    text = body[: 4 * REPLY_LIMIT].decode("utf-8", "replace").strip()
    if text.isprintable():
        return text[:REPLY_LIMIT]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[
        :REPLY_LIMIT
    ]
