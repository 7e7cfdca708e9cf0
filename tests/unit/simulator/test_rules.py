"""The provider's rules, as tables."""

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.simulator.rules import (
    OFFENCES,
    Answer,
    Ban,
    Provider,
    Request,
    Service,
    Used,
    international,
)

WALL = datetime(2026, 5, 13, 12, tzinfo=UTC).timestamp()
HOME = "127.0.0.1"
GOOD = Request(user_id="7", service_id="42", msisdn="359881234567", text="hello", extended="yes")


def asked(
    provider: Provider, request: Request = GOOD, *, ip: str = HOME, wall: float = WALL, now: float
) -> Answer:
    """The provider's answer."""
    return provider.answer(request, ip, wall=wall, now=now)


def at(text: str, zone: str = "Europe/Sofia") -> float:
    """A local time in seconds since the epoch."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({}, Answer.MSG_OK),
        ({"extended": None}, Answer.MSG_OK),
        ({"extended": "no"}, Answer.INVALID_INPUT),
        ({"extended": ""}, Answer.INVALID_INPUT),
        ({"user_id": None}, Answer.INVALID_INPUT),
        ({"user_id": ""}, Answer.INVALID_INPUT),
        ({"user_id": "8"}, Answer.INVALID_INPUT),
        ({"user_id": "07"}, Answer.INVALID_INPUT),
        ({"user_id": "\u0667"}, Answer.INVALID_INPUT),
        ({"service_id": None}, Answer.INVALID_INPUT),
        ({"service_id": "43"}, Answer.INVALID_INPUT),
        ({"service_id": "042"}, Answer.INVALID_INPUT),
        ({"msisdn": None}, Answer.INVALID_INPUT),
        ({"msisdn": ""}, Answer.INVALID_INPUT),
        ({"msisdn": "0881234567"}, Answer.INVALID_MSISDN),
        ({"text": None}, Answer.INVALID_INPUT),
        ({"text": ""}, Answer.INVALID_INPUT),
        ({"text": "я" * 160}, Answer.MSG_OK),
        ({"text": "😀" * 160}, Answer.MSG_OK),
        ({"text": "я" * 161}, Answer.INVALID_INPUT),
        ({"sound": False}, Answer.INVALID_INPUT),
    ],
)
def test_parameters(change: dict[str, Any], answer: Answer) -> None:
    """Each parameter is checked, and a good request is accepted."""
    provider = Provider([Service(42, user=7)])

    assert asked(provider, replace(GOOD, **change), now=0) is answer


@pytest.mark.parametrize(
    ("number", "good"),
    [
        ("359881234567", True),
        ("359871234567", True),
        ("359891234567", True),
        ("35988123456", False),
        ("3598812345678", False),
        ("35929876543", True),
        ("35982123456", True),
        ("35982123", False),
        ("359021234567", False),
        ("447911123456", True),
        ("12025550123", True),
        ("123456789012345", True),
        ("1234567890123456", False),
        ("123456789", False),
        ("0881234567", False),
        ("00359881234567", False),
        ("+359881234567", False),
        (" 359881234567", False),
        ("359881234567\n", False),
        ("35988 1234567", False),
        ("35988123456\u0667", False),
        ("35988123456a", False),
        ("", False),
    ],
)
def test_numbers(number: str, good: bool) -> None:  # noqa: FBT001 - a table's column
    """Only digits in international format are a number."""
    assert international(number) is good


def test_without_services() -> None:
    """A provider with no services set up takes any service without limits, but checks numbers."""
    provider = Provider()

    for now in range(3):
        assert asked(provider, replace(GOOD, service_id="99", user_id="1"), now=now) == "MSG_OK"
    assert asked(provider, replace(GOOD, msisdn="123"), now=3) is Answer.INVALID_MSISDN
    assert asked(provider, replace(GOOD, service_id="x"), now=3) is Answer.INVALID_INPUT
    assert provider.used(42, WALL) is None


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        ({"allowed_ips": ("127.0.0.1",)}, Answer.MSG_OK),
        ({"allowed_ips": ("10.1.2.3", "127.0.0.0/8")}, Answer.MSG_OK),
        ({"allowed_ips": ("127.0.0.2", "::/0")}, Answer.INVALID_IP),
        ({"disabled": True}, Answer.SERVICE_DISABLED),
        ({"disabled": True, "allowed_ips": ("10.0.0.1",)}, Answer.INVALID_IP),
        ({"templates": ("hel+o", "x")}, Answer.MSG_OK),
        ({"templates": ("hell",)}, Answer.INVALID_PATTERN),
        ({"day": 0}, Answer.LIMIT_DAY),
        ({"week": 0, "day": 0}, Answer.LIMIT_WEEK),
        ({"month": 0, "week": 0, "day": 0}, Answer.LIMIT_MONTH),
        ({"user": None}, Answer.MSG_OK),
    ],
)
def test_service_rules(change: dict[str, Any], answer: Answer) -> None:
    """Each rule of a service gives its answer."""
    provider = Provider([replace(Service(42, user=7), **change)])

    assert asked(provider, now=0) is answer
    assert asked(provider, now=0) is answer


def test_delay_counts_from_the_last_accepted() -> None:
    """A message that comes sooner than the delay is refused and does not move the clock."""
    provider = Provider([Service(42, delay=0.05)])

    answers = [asked(provider, now=now) for now in (1.0, 1.049, 1.0499, 1.05, 1.0999, 1.1001)]

    assert answers == [
        Answer.MSG_OK,
        Answer.LIMIT_DELAY,
        Answer.LIMIT_DELAY,
        Answer.MSG_OK,
        Answer.LIMIT_DELAY,
        Answer.MSG_OK,
    ]


def test_refused_counts_in_no_limit() -> None:
    """What is refused, for whatever reason, uses nothing up."""
    provider = Provider([Service(42, day=2, delay=1.0, templates=("hello",))])

    asked(provider, now=0)
    asked(provider, now=0.5)
    asked(provider, replace(GOOD, text="no"), now=5)
    asked(provider, replace(GOOD, msisdn="1"), now=5)

    assert provider.used(42, WALL) == Used(1, 1, 1)
    assert asked(provider, now=5) is Answer.MSG_OK
    assert asked(provider, now=10) is Answer.LIMIT_DAY
    assert provider.used(42, WALL) == Used(2, 2, 2)


@pytest.mark.parametrize(
    ("period", "zone", "before", "after", "renewed"),
    [
        ("day", "Europe/Sofia", "2026-05-13T00:00:00", "2026-05-13T23:59:59", False),
        ("day", "Europe/Sofia", "2026-05-13T23:59:59", "2026-05-14T00:00:00", True),
        # The clock goes forward in a night of 23 hours, and back in one of 25.
        ("day", "Europe/Sofia", "2026-03-29T00:00:00", "2026-03-29T23:59:59", False),
        ("day", "Europe/Sofia", "2026-03-29T23:59:59", "2026-03-30T00:00:00", True),
        ("day", "Europe/Sofia", "2026-10-25T00:00:00", "2026-10-25T23:59:59", False),
        ("day", "Europe/Sofia", "2026-10-25T23:59:59", "2026-10-26T00:00:00", True),
        ("day", "Pacific/Auckland", "2026-05-13T23:59:59", "2026-05-14T00:00:00", True),
        ("week", "Europe/Sofia", "2026-05-11T00:00:00", "2026-05-17T23:59:59", False),
        ("week", "Europe/Sofia", "2026-05-17T23:59:59", "2026-05-18T00:00:00", True),
        ("week", "Europe/Sofia", "2026-12-31T12:00:00", "2027-01-01T12:00:00", False),
        ("week", "UTC", "2026-03-29T23:59:59", "2026-03-30T00:00:00", True),
        ("month", "Europe/Sofia", "2026-05-01T00:00:00", "2026-05-31T23:59:59", False),
        ("month", "Europe/Sofia", "2026-05-31T23:59:59", "2026-06-01T00:00:00", True),
        ("month", "Europe/Sofia", "2026-12-31T23:59:59", "2027-01-01T00:00:00", True),
        ("month", "Europe/Sofia", "2026-05-31T12:00:00", "2027-05-31T12:00:00", True),
    ],
)
def test_windows(
    period: str,
    zone: str,
    before: str,
    after: str,
    renewed: bool,  # noqa: FBT001 - a table's column
) -> None:
    """A limit is renewed when a calendar window of the service's zone begins, and only then."""
    limit: dict[str, Any] = {period: 1}
    provider = Provider([Service(42, timezone=zone, **limit)])

    assert asked(provider, wall=at(before, zone), now=0) is Answer.MSG_OK

    answer = asked(provider, wall=at(after, zone), now=1)
    assert answer == ("MSG_OK" if renewed else f"LIMIT_{period.upper()}")


@given(
    seconds=st.lists(st.integers(0, 500 * 86400), min_size=1, max_size=60),
    most=st.integers(0, 5),
    zone=st.sampled_from(["Europe/Sofia", "America/St_Johns", "Australia/Lord_Howe", "UTC"]),
)
def test_weeks_agree_with_the_iso_calendar(seconds: list[int], most: int, zone: str) -> None:
    """Over any times, each ISO week gets what was asked, up to the limit and no further."""
    provider = Provider([Service(42, week=most, timezone=zone)])
    start = datetime(2026, 1, 1, tzinfo=UTC)
    wanted: Counter[tuple[int, int]] = Counter()
    accepted: Counter[tuple[int, int]] = Counter()

    for second in sorted(seconds):
        moment = start + timedelta(seconds=second)
        week = moment.astimezone(ZoneInfo(zone)).isocalendar()[:2]
        wanted[week] += 1
        answer = asked(provider, wall=moment.timestamp(), now=second)
        accepted[week] += answer is Answer.MSG_OK

    assert accepted == {week: min(count, most) for week, count in wanted.items()}


def test_changed_service_keeps_what_it_used() -> None:
    """A changed limit holds at once, over what was used before."""
    provider = Provider([Service(42, day=2)])
    asked(provider, now=0)

    provider.change(replace(provider.services[42], day=1))
    assert asked(provider, now=1) is Answer.LIMIT_DAY

    provider.change(replace(provider.services[42], day=None, disabled=True))
    assert asked(provider, now=2) is Answer.SERVICE_DISABLED

    provider.change(Service(43))
    assert asked(provider, replace(GOOD, service_id="43"), now=3) is Answer.MSG_OK
    assert provider.used(42, WALL) == Used(1, 1, 1)


@pytest.mark.parametrize("offence", sorted(OFFENCES))
def test_misbehaviour_is_banned(offence: Answer) -> None:
    """One offence too many within the period bans the address for the time set, and no other."""
    service = Service(42, delay=1000.0, templates=("hello",), allowed_ips=("127.0.0.0/8",))
    bad = {
        Answer.LIMIT_DELAY: GOOD,
        Answer.INVALID_IP: GOOD,
        Answer.INVALID_MSISDN: replace(GOOD, msisdn="1"),
        Answer.INVALID_PATTERN: replace(GOOD, text="no"),
        Answer.INVALID_INPUT: replace(GOOD, text=None),
    }[offence]
    ip = "10.0.0.1" if offence is Answer.INVALID_IP else HOME
    provider = Provider([service], Ban(refused=2, within=10, seconds=60))
    asked(provider, now=1)

    assert [asked(provider, bad, ip=ip, now=now) for now in (5, 6, 14)] == [offence] * 3
    assert provider.banned(20) == {ip: 54}
    assert asked(provider, ip=ip, now=73.9) is Answer.BAN_IP_TEMP
    assert asked(provider, ip="127.0.0.9", now=73.9) is Answer.LIMIT_DELAY
    assert asked(provider, bad, ip=ip, now=74) is offence
    assert provider.banned(74) == {}


def test_old_offences_are_forgotten() -> None:
    """Offences further apart than the period bring no ban, those exactly as far apart do."""
    provider = Provider(ban=Ban(refused=1, within=10, seconds=60))
    bad = replace(GOOD, msisdn="1")

    answers = [asked(provider, bad, now=now) for now in (0, 10.5, 21, 31, 31.1)]

    assert answers == [Answer.INVALID_MSISDN] * 4 + [Answer.BAN_IP_TEMP]


def test_ban_after_so_many_accepted() -> None:
    """The ban after N accepted messages comes exactly then, and only once."""
    provider = Provider(ban=Ban(after=2, seconds=5))

    answers = [asked(provider, now=now) for now in (0, 1, 2, 5.9, 6, 7, 8, 9)]

    assert answers == [Answer.MSG_OK] * 2 + [Answer.BAN_IP_TEMP] * 2 + [Answer.MSG_OK] * 4
    assert provider.bans == 1


def test_ban_by_command() -> None:
    """A ban by command holds for all addresses or for one, until it ends or is lifted."""
    provider = Provider()

    provider.ban_now(5, 10)
    assert asked(provider, now=14.9) is Answer.BAN_IP_TEMP
    assert asked(provider, now=15) is Answer.MSG_OK

    provider.ban_now(5, 20, "10.0.0.1")
    assert provider.banned(21) == {"10.0.0.1": 4}
    assert asked(provider, now=21) is Answer.MSG_OK
    assert asked(provider, ip="10.0.0.1", now=21) is Answer.BAN_IP_TEMP
    provider.unban()
    assert asked(provider, ip="10.0.0.1", now=21) is Answer.MSG_OK


def test_reset_forgets_but_keeps_the_setup() -> None:
    """After a reset limits are unused, bans are lifted and the ban after N comes anew."""
    provider = Provider([Service(42, day=1)], Ban(after=1, seconds=100))
    asked(provider, now=0)

    provider.reset()

    assert provider.bans == 0
    assert asked(provider, now=1) is Answer.MSG_OK
    assert asked(provider, now=2) is Answer.BAN_IP_TEMP


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"day": -1}, "service 42: day must not be negative, but is -1."),
        ({"delay": -0.1}, "service 42: delay must not be negative, but is -0.1."),
        ({"timezone": "Mars/Olympus"}, "service 42: there is no time zone 'Mars/Olympus'."),
        ({"timezone": ""}, "service 42: there is no time zone ''."),
        ({"allowed_ips": ("x",)}, "service 42: 'x' is neither an address nor a network."),
        ({"templates": ("(",)}, "service 42: the template '(' is no regular expression: "),
    ],
)
def test_impossible_service(change: dict[str, Any], sentence: str) -> None:
    """A service that cannot be is refused in one sentence."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        Service(42, **change)

    assert str(caught.value).startswith(sentence)


def test_impossible_ban() -> None:
    """A ban for less than no time is refused."""
    with pytest.raises(ValueError, match=r"ban: seconds must not be negative"):
        Ban(seconds=-1)
