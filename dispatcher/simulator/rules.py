"""What the provider answers, and why: SMSPAY's bulk protocol as a value in, an answer out.

Nothing here reads a clock or a socket. Times are arguments: `wall` in seconds since the epoch
decides the calendar windows, `now` in seconds of a monotonic clock decides spacing and bans.
"""

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from ipaddress import ip_address, ip_network
from zoneinfo import ZoneInfo

TEXT_MAX = 160

_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
_FOREIGN = re.compile(r"(?!359)[1-9][0-9]{9,14}", re.ASCII)
_BULGARIAN = re.compile(r"359(?:8[789][0-9]{7}|(?!8[789])[1-9][0-9]{6,8})", re.ASCII)


class Answer(StrEnum):
    """The first word of every line the provider answers with."""

    MSG_OK = "MSG_OK"
    BAN_IP_TEMP = "BAN_IP_TEMP"
    INVALID_IP = "INVALID_IP"
    SERVICE_DISABLED = "SERVICE_DISABLED"
    LIMIT_DAY = "LIMIT_DAY"
    LIMIT_WEEK = "LIMIT_WEEK"
    LIMIT_MONTH = "LIMIT_MONTH"
    LIMIT_DELAY = "LIMIT_DELAY"
    INVALID_MSISDN = "INVALID_MSISDN"
    INVALID_PATTERN = "INVALID_PATTERN"
    INVALID_INPUT = "INVALID_INPUT"


OFFENCES = frozenset(
    {
        Answer.LIMIT_DELAY,
        Answer.INVALID_IP,
        Answer.INVALID_MSISDN,
        Answer.INVALID_PATTERN,
        Answer.INVALID_INPUT,
    }
)
"""Answers that show a client which does not keep to the rules; too many bring a ban."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request's parameters, decoded; None where one is missing.

    `sound` is false when the query could not be read without guessing: a parameter given twice,
    a broken percent escape, bytes that are no UTF-8.
    """

    user_id: str | None
    service_id: str | None
    msisdn: str | None
    text: str | None
    extended: str | None
    sound: bool = True


@dataclass(frozen=True, slots=True)
class Service:
    """A service as it is set up at the provider.

    `user` None takes any customer; `day`, `week` and `month` None are no limit; `delay` is in
    seconds; `allowed_ips` holds addresses or networks, empty allows any; `templates` are regular
    expressions of which one must match the whole text, empty allows any.

    Raises ValueError with one sentence for a value that cannot be.
    """

    id: int
    user: int | None = None
    day: int | None = None
    week: int | None = None
    month: int | None = None
    delay: float = 0.0
    timezone: str = "Europe/Sofia"
    allowed_ips: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    disabled: bool = False

    def __post_init__(self) -> None:
        """Refuse what could only fail later, in the middle of a request."""
        for name in ("id", "user", "day", "week", "month", "delay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"service {self.id}: {name} must not be negative, but is {value}.")
        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise ValueError(
                f"service {self.id}: there is no time zone {self.timezone!r}."
            ) from None
        for address in self.allowed_ips:
            try:
                ip_network(address)
            except ValueError:
                raise ValueError(
                    f"service {self.id}: {address!r} is neither an address nor a network."
                ) from None
        for template in self.templates:
            try:
                re.compile(template)
            except re.error as error:
                raise ValueError(
                    f"service {self.id}: the template {template!r} is no regular expression: "
                    f"{error}."
                ) from None


@dataclass(frozen=True, slots=True)
class Ban:
    """When an address is banned.

    More than `refused` answers of OFFENCES within `within` seconds ban for `seconds`; so does,
    once, the accepted message number `after`. None switches either off.
    """

    refused: int | None = None
    within: float = 10.0
    seconds: float = 60.0
    after: int | None = None

    def __post_init__(self) -> None:
        """Refuse spans and counts that mean nothing."""
        for name in ("refused", "within", "seconds", "after"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"ban: {name} must not be negative, but is {value}.")


@dataclass(frozen=True, slots=True)
class Used:
    """How many messages of a service were accepted in its present windows."""

    day: int
    week: int
    month: int


def international(msisdn: str) -> bool:
    """Whether this is a number in international format, digits only.

    E.164 allows 15 digits. For +359 the national part has 7 to 9 digits, for its mobile codes
    87, 88 and 89 exactly 9 (the Bulgarian numbering plan).
    """
    return bool(_BULGARIAN.fullmatch(msisdn) or _FOREIGN.fullmatch(msisdn))


class _Account:
    """A service's set-up made ready for use, and what it has used of its limits."""

    __slots__ = ("_allowed", "_networks", "_patterns", "_windows", "_zone", "last", "service")

    def __init__(self, service: Service) -> None:
        self.last: float | None = None
        self._windows: list[tuple[int, int]] = [(0, 0), (0, 0), (0, 0)]
        self.change(service)

    def change(self, service: Service) -> None:
        """Take a new set-up; what was used stays used."""
        self.service = service
        self._zone = ZoneInfo(service.timezone)
        self._patterns = [re.compile(template) for template in service.templates]
        self._networks = [ip_network(address) for address in service.allowed_ips]
        self._allowed: dict[str, bool] = {}

    def allows(self, ip: str) -> bool:
        """Whether requests may come from this address."""
        if not self._networks:
            return True
        known = self._allowed.get(ip)
        if known is None:
            address = ip_address(ip)
            known = self._allowed[ip] = any(address in network for network in self._networks)
        return known

    def matches(self, text: str) -> bool:
        """Whether one of the templates matches the whole text."""
        return not self._patterns or any(pattern.fullmatch(text) for pattern in self._patterns)

    def used(self, wall: float) -> tuple[int, int, int]:
        """Day, week and month counts at this time; a new window begins at 0."""
        # Local calendar numbers, not instants: they need no arithmetic across a clock change.
        today = datetime.fromtimestamp(wall, self._zone).date()
        ordinal = today.toordinal()
        keys = (ordinal, (ordinal - 1) // 7, today.year * 12 + today.month)
        for place, key in enumerate(keys):
            if self._windows[place][0] != key:
                self._windows[place] = (key, 0)
        day, week, month = self._windows
        return day[1], week[1], month[1]

    def count(self, now: float) -> None:
        """Count one accepted message in the windows that `used` has looked up just before."""
        self._windows = [(key, used + 1) for key, used in self._windows]
        self.last = now


class Provider:
    """The provider's memory: services, what they used, who is banned.

    Without services it accepts any service, without limits.
    """

    def __init__(self, services: Iterable[Service] = (), ban: Ban | None = None) -> None:
        self.ban = ban or Ban()
        self.bans = 0
        self._accounts = {str(service.id): _Account(service) for service in services}
        self._accepted = 0
        self._offences: dict[str, deque[float]] = {}
        self._banned: dict[str, float] = {}
        self._all_banned_until = 0.0

    @property
    def services(self) -> dict[int, Service]:
        """The services as they are set up now, by their number."""
        return {account.service.id: account.service for account in self._accounts.values()}

    def change(self, service: Service) -> None:
        """Add a service, or change one and keep what it has used."""
        account = self._accounts.get(str(service.id))
        if account is None:
            self._accounts[str(service.id)] = _Account(service)
        else:
            account.change(service)

    def used(self, service_id: int, wall: float) -> Used | None:
        """What a service has used of its windows at this time; None if it is not set up."""
        account = self._accounts.get(str(service_id))
        return Used(*account.used(wall)) if account else None

    def ban_now(self, seconds: float, now: float, ip: str | None = None) -> None:
        """Ban one address, or all, for so many seconds from `now`."""
        self.bans += 1
        if ip is None:
            self._all_banned_until = now + seconds
        else:
            self._banned[ip] = now + seconds

    def unban(self) -> None:
        """Lift every ban and forget the offences."""
        self._all_banned_until = 0.0
        self._banned.clear()
        self._offences.clear()

    def banned(self, now: float) -> dict[str, float]:
        """The addresses banned at this time with the seconds left; `*` stands for all."""
        until = {"*": self._all_banned_until, **self._banned}
        return {ip: end - now for ip, end in until.items() if end > now}

    def reset(self) -> None:
        """Forget what was used and who is banned; the set-up stays."""
        self._accounts = {
            name: _Account(account.service) for name, account in self._accounts.items()
        }
        self._accepted = 0
        self.bans = 0
        self.unban()

    def answer(self, request: Request, ip: str, *, wall: float, now: float) -> Answer:
        """Decide one request from the address `ip`; an accepted one is counted."""
        if self._all_banned_until > now or self._banned.get(ip, 0.0) > now:
            return Answer.BAN_IP_TEMP
        answer = self._judge(request, ip, wall, now)
        if answer is Answer.MSG_OK:
            self._accepted += 1
            if self._accepted == self.ban.after:
                self.ban_now(self.ban.seconds, now, ip)
        elif answer in OFFENCES and self.ban.refused is not None:
            self._offend(ip, now, self.ban.refused)
        return answer

    def _judge(self, request: Request, ip: str, wall: float, now: float) -> Answer:
        account = self._accounts.get(request.service_id or "")
        msisdn, text = request.msisdn, request.text
        if (
            not request.sound
            or not msisdn
            or not text
            or len(text) > TEXT_MAX
            or not _NUMBER.fullmatch(request.user_id or "")
            or not _NUMBER.fullmatch(request.service_id or "")
            or request.extended not in (None, "yes")
            or (account is None and self._accounts)
        ):
            return Answer.INVALID_INPUT
        if account is None:
            return Answer.MSG_OK if international(msisdn) else Answer.INVALID_MSISDN
        service = account.service
        if service.user is not None and request.user_id != str(service.user):
            return Answer.INVALID_INPUT
        if not account.allows(ip):
            return Answer.INVALID_IP
        if service.disabled:
            return Answer.SERVICE_DISABLED
        if not international(msisdn):
            return Answer.INVALID_MSISDN
        if not account.matches(text):
            return Answer.INVALID_PATTERN
        return self._limit(account, wall, now)

    def _limit(self, account: _Account, wall: float, now: float) -> Answer:
        service = account.service
        day, week, month = account.used(wall)
        # The longest first: it is the one that the customer has to wait for.
        if service.month is not None and month >= service.month:
            return Answer.LIMIT_MONTH
        if service.week is not None and week >= service.week:
            return Answer.LIMIT_WEEK
        if service.day is not None and day >= service.day:
            return Answer.LIMIT_DAY
        if account.last is not None and now - account.last < service.delay:
            return Answer.LIMIT_DELAY
        account.count(now)
        return Answer.MSG_OK

    def _offend(self, ip: str, now: float, most: int) -> None:
        offences = self._offences.setdefault(ip, deque())
        offences.append(now)
        while now - offences[0] > self.ban.within:
            offences.popleft()
        if len(offences) > most:
            offences.clear()
            self.ban_now(self.ban.seconds, now, ip)
