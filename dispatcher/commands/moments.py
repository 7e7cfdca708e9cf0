"""Times and spans, as people write and read them."""

import re
from datetime import UTC, datetime, timedelta

_UNITS = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(ms|s|m|h|d|w)", re.ASCII)
_SPAN = re.compile(rf"(?: *{_PART.pattern})+ *", re.ASCII)


def span(written: str) -> timedelta:
    """Read a span: `2h`, `90d`, `1h30m`, `50ms`. Raises ValueError with a plain phrase."""
    if not _SPAN.fullmatch(written):
        raise ValueError("it is no span of time such as 30m, 2h or 90d")
    try:
        return sum(
            (float(number) * _UNITS[unit] for number, unit in _PART.findall(written)), timedelta()
        )
    except OverflowError:
        raise ValueError("it is too long") from None


def seconds(written: str) -> timedelta:
    """Read plain seconds, or a span. Raises ValueError with a plain phrase."""
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", written, re.ASCII):
        return timedelta(seconds=float(written))
    if not _SPAN.fullmatch(written):
        raise ValueError("it is no number of seconds, nor a span of time such as 50ms")
    return span(written)


def moment(written: str, now: datetime) -> datetime:
    """Read a time: ISO 8601, by the zone of this machine if it names none, or a span from now.

    Raises ValueError with a plain phrase.
    """
    written = written.strip()
    if _SPAN.fullmatch(written):
        try:
            return now + span(written)
        except OverflowError:
            raise ValueError("it is too long") from None
    try:
        read = datetime.fromisoformat(written)
        return read.astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError("it is no time such as 2030-12-31T18:00+02:00 or 2h") from None


def lasting(length: timedelta | float) -> str:
    """A length of time in its two largest units: `3 d 4 h`, `12 s`."""
    total = length.total_seconds() if isinstance(length, timedelta) else length
    if total < 1:
        return f"{total * 1000:.0f} ms"
    left = round(total)
    for unit, size, smaller, part in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if left >= size:
            rest = left % size // part
            return f"{left // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{left} s"


def infinity(time: datetime) -> str | None:
    """The name of a time that PostgreSQL calls infinite; None for any other."""
    match time.replace(tzinfo=None):
        case datetime.max:  # noqa: DTZ901 - what asyncpg reads it as
            return "infinity"
        case datetime.min:  # noqa: DTZ901 - likewise
            return "-infinity"
    return None


def local(time: datetime) -> str:
    """A time by the zone of this machine: `2026-11-22 18:00:05 +0200`."""
    endless = infinity(time)
    if endless is not None:
        return endless
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
