"""Delivery reports: the provider's words, and what they may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from dispatcher.domain.message import Status

REPORTED: Final = frozenset({Status.ENROUTE, Status.DELIVERED, Status.UNDELIVERABLE})
"""The states that a report can tell."""

WORDS: Final[Mapping[str, Status]] = {
    **dict.fromkeys(("ENROUTE", "ACCEPTD", "ACCEPTED", "SENT", "BUFFERED"), Status.ENROUTE),
    **dict.fromkeys(("DELIVRD", "DELIVERED"), Status.DELIVERED),
    **dict.fromkeys(
        (
            "UNDELIV",
            "UNDELIVERABLE",
            "UNDELIVERED",
            "EXPIRED",
            "REJECTD",
            "REJECTED",
            "DELETED",
            "FAILED",
        ),
        Status.UNDELIVERABLE,
    ),
}
"""The provider's words in capitals, with those of SMPP 5.0's message states."""

_ORDER: Final[Mapping[Status, int]] = {
    Status.ACCEPTED: 0,
    Status.ENROUTE: 1,
    Status.DELIVERED: 2,
    Status.UNDELIVERABLE: 2,
}


def meaning(word: str, words: Mapping[str, Status] = WORDS) -> Status | None:
    """Tell which state a word means, case ignored, or None for one that is not known."""
    return words.get(word.strip().upper())


def advance(current: Status, reported: Status) -> Status:
    """The state of a message after a report: forward or unchanged, never backwards."""
    if current in _ORDER and _ORDER[reported] > _ORDER[current]:
        return reported
    return current
