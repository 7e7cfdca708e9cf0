"""Delivery reports: how they are written, the provider's words, and what they may change."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import parse_qsl

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


FIELDS: Final = 100
"""Parameters of a report, at most."""

Pairs = list[tuple[str, str]]
Params = dict[str, str | list[str]]
"""Parameters by name; those given more than once as a list."""


def from_form(data: bytes) -> Pairs | None:
    """The pairs of a query or of a form, with a mark for what is no UTF-8; None for too many."""
    try:
        return parse_qsl(
            data.decode("utf-8", "replace"),
            keep_blank_values=True,
            errors="replace",
            max_num_fields=FIELDS,
        )
    except ValueError:
        return None


def from_json(data: bytes) -> Pairs | None:
    """The members of a JSON object, None if it is none or has too many.

    Numbers keep their digits, null is empty, and what is nested stays JSON.
    """
    try:
        value = json.loads(data, parse_int=str, parse_float=str, parse_constant=str)
        if not isinstance(value, dict) or len(value) > FIELDS:
            return None
        return [(name, _member(member)) for name, member in value.items()]
    except (ValueError, RecursionError):
        return None


def _member(member: object) -> str:
    if member is None:
        return ""
    return member if isinstance(member, str) else json.dumps(member, ensure_ascii=False)


def gathered(pairs: Iterable[tuple[str, str]]) -> Params:
    """Parameters by name, with a mark for what PostgreSQL's jsonb cannot hold."""
    params: Params = {}
    for raw_name, raw_value in pairs:
        name, value = _storable(raw_name), _storable(raw_value)
        known = params.get(name)
        if known is None:
            params[name] = value
        elif isinstance(known, list):
            known.append(value)
        else:
            params[name] = [known, value]
    return params


def _storable(text: str) -> str:
    if text.isprintable():
        return text
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def last(params: Params, name: str) -> str:
    """The value of a parameter, the last if there are several; empty if there is none."""
    value = params.get(name, "")
    return (value if isinstance(value, str) else value[-1]).strip()


_NUMBER: Final = re.compile(r"\d{5}")


def tellable(word: str) -> str | None:
    """A word as a log may have it; None for one that could hold a number or a text."""
    fits = len(word) <= 32 and word.isascii() and word.isprintable()
    return word if fits and not _NUMBER.search(word) else None
