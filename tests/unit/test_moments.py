from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.commands.moments import lasting, local, moment, seconds, span

NOW = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)


@pytest.fixture
def sofia(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the zone of this machine, as far as this process sees it."""
    import time

    monkeypatch.setenv("TZ", "Europe/Sofia")
    time.tzset()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2h", timedelta(hours=2)),
        ("90d", timedelta(days=90)),
        ("1h30m", timedelta(minutes=90)),
        ("1h 30m", timedelta(minutes=90)),
        (" 5 m ", timedelta(minutes=5)),
        ("50ms", timedelta(milliseconds=50)),
        ("1.5s", timedelta(seconds=1.5)),
        ("2w", timedelta(weeks=2)),
        ("0s", timedelta()),
    ],
)
def test_span(written: str, meant: timedelta) -> None:
    """A span is read as people write it."""
    assert span(written) == meant


@pytest.mark.parametrize(
    "written", ["", " ", "2", "h", "-2h", "2h!", "2 hours", "2h x", "٢h", "1e9h", "1,5h"]
)
def test_no_span(written: str) -> None:
    """What is no span is refused with a plain phrase."""
    with pytest.raises(ValueError, match=r"^it is no span of time"):
        span(written)


@pytest.mark.parametrize("written", ["99999999999d", "999999999w"])
def test_endless_span(written: str) -> None:
    """A span beyond all calendars is refused with a plain phrase."""
    with pytest.raises(ValueError, match=r"^it is too long$"):
        span(written)


@given(st.integers(0, 10**6), st.sampled_from(["ms", "s", "m", "h", "d"]))
def test_every_span_is_seconds_too(number: int, unit: str) -> None:
    """Where seconds are asked for, a span is taken as well."""
    assert seconds(f"{number}{unit}") == span(f"{number}{unit}")


@pytest.mark.parametrize(
    ("written", "meant"), [("0.05", 0.05), ("5", 5.0), (".5", 0.5), ("3.", 3.0), ("0", 0.0)]
)
def test_plain_seconds(written: str, meant: float) -> None:
    """A plain number of seconds is taken as it is."""
    assert seconds(written) == timedelta(seconds=meant)


@pytest.mark.parametrize("written", ["-1", "nan", "inf", "1e5", "", "1_000"])
def test_no_seconds(written: str) -> None:
    """What is neither seconds nor a span is refused."""
    with pytest.raises(ValueError, match=r"^it is no number of seconds"):
        seconds(written)


@pytest.mark.usefixtures("sofia")
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2026-12-31T18:00+02:00", datetime(2026, 12, 31, 16, 0, tzinfo=UTC)),
        ("2026-12-31T18:00Z", datetime(2026, 12, 31, 18, 0, tzinfo=UTC)),
        ("2026-12-31 18:00", datetime(2026, 12, 31, 16, 0, tzinfo=UTC)),
        ("2026-07-01 18:00", datetime(2026, 7, 1, 15, 0, tzinfo=UTC)),
        ("2026-12-31", datetime(2026, 12, 30, 22, 0, tzinfo=UTC)),
        ("2h", NOW + timedelta(hours=2)),
        (" 1d ", NOW + timedelta(days=1)),
    ],
)
def test_moment(written: str, meant: datetime) -> None:
    """A time goes by its own zone, or this machine's, or counts from now."""
    assert moment(written, NOW) == meant


@pytest.mark.parametrize("written", ["", "soon", "2026-13-01", "18:00", "2026-02-30T10:00Z"])
def test_no_moment(written: str) -> None:
    """What is no time is refused with a plain phrase."""
    with pytest.raises(ValueError, match=r"^it is no time"):
        moment(written, NOW)


@pytest.mark.parametrize("written", ["9999999d", "9999-12-31T23:59-20:00"])
def test_moment_beyond_the_calendar(written: str) -> None:
    """A time that no calendar holds is refused with a plain phrase."""
    with pytest.raises(ValueError, match=r"^it is "):
        moment(written, NOW)


@pytest.mark.parametrize(
    ("length", "shown"),
    [
        (0.0, "0 ms"),
        (0.0504, "50 ms"),
        (1.0, "1 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (7265, "2 h 1 min"),
        (timedelta(days=3, hours=4, minutes=5), "3 d 4 h"),
    ],
)
def test_lasting(length: timedelta | float, shown: str) -> None:
    """A length is told in its two largest units."""
    assert lasting(length) == shown


@pytest.mark.usefixtures("sofia")
def test_local() -> None:
    """A time is shown by this machine's zone, which it names."""
    assert local(NOW) == "2026-11-22 12:00:00 +0200"
