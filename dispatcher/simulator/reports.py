"""Delivery reports: what is reported of an accepted message, when, and the sending of it."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heappop, heappush

import aiohttp

from dispatcher.simulator.faults import Draw, between, check_rates, check_span, one_of

ENROUTE = "ENROUTE"
DELIVERED = "DELIVRD"
UNDELIVERED = "UNDELIV"

_ATTEMPT_SECONDS = 5.0
_RETRY_MOST = 30.0
_ANSWER_MAX = 1024


class Mishap(StrEnum):
    """What can befall a message's reports."""

    EARLY = "early"
    LATE = "late"
    DOUBLED = "doubled"
    SWAPPED = "swapped"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Reports:
    """Where reports go, and what befalls them, as shares of all accepted extended messages.

    `url` None sends none. `enroute` and `final` are spans in seconds after the answer has left.
    `undelivered` is the share whose end is UNDELIV. `early`: the first report is sent before the
    answer to the request. `late`: both come `late_by` seconds later. `doubled`: each is sent
    twice. `swapped`: the end comes first. `lost`: one of them, or both, is never sent.

    At most `concurrency` are under way; at most `capacity` wait, more are dropped and counted. One
    that is not answered 200 is sent again after `retry_after` seconds, doubling up to 30, for up to
    `retry_for` seconds.

    Raises ValueError with one sentence for a value that cannot be.
    """

    url: str | None = None
    id_param: str = "sms_id"
    status_param: str = "status"
    enroute: tuple[float, float] = (1.0, 3.0)
    final: tuple[float, float] = (10.0, 30.0)
    undelivered: float = 0.0
    early: float = 0.0
    late: float = 0.0
    late_by: float = 60.0
    doubled: float = 0.0
    swapped: float = 0.0
    lost: float = 0.0
    concurrency: int = 20
    capacity: int = 100_000
    retry_after: float = 0.5
    retry_for: float = 3600.0

    def __post_init__(self) -> None:
        """Refuse what could only fail later, in the middle of sending."""
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("reports: url must begin with http:// or https://.")
        check_rates("reports", {mishap.value: rate for mishap, rate in self.rates})
        check_rates("reports", {"undelivered": self.undelivered})
        check_span("reports: enroute", self.enroute)
        check_span("reports: final", self.final)
        if self.concurrency < 1 or self.capacity < 1:
            raise ValueError("reports: concurrency and capacity must be at least 1.")
        if min(self.late_by, self.retry_after, self.retry_for) < 0:
            raise ValueError("reports: late_by, retry_after and retry_for must not be negative.")

    @property
    def rates(self) -> tuple[tuple[Mishap, float], ...]:
        """Each mishap with its rate, in the order in which a drawn number walks them."""
        return (
            (Mishap.EARLY, self.early),
            (Mishap.LATE, self.late),
            (Mishap.DOUBLED, self.doubled),
            (Mishap.SWAPPED, self.swapped),
            (Mishap.LOST, self.lost),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """One report: `delay` in seconds after the answer, None for one that is sent before it."""

    identifier: str
    status: str
    delay: float | None


def plan(settings: Reports, drawn: Draw, identifier: str) -> list[Report]:
    """The reports of one accepted message, in the order in which they are to be sent."""
    mishap = one_of(drawn.report, settings.rates)
    end = UNDELIVERED if drawn.outcome < settings.undelivered else DELIVERED
    shift = settings.late_by if mishap is Mishap.LATE else 0.0
    first = between(settings.enroute, drawn.enroute) + shift
    last = max(first, between(settings.final, drawn.final) + shift)
    if mishap is Mishap.EARLY:
        return [Report(identifier, ENROUTE, None), Report(identifier, end, last)]
    if mishap is Mishap.SWAPPED:
        return [Report(identifier, end, first), Report(identifier, ENROUTE, last)]
    reports = [Report(identifier, ENROUTE, first), Report(identifier, end, last)]
    if mishap is Mishap.DOUBLED:
        return [report for report in reports for _ in range(2)]
    if mishap is Mishap.LOST:
        return [reports[:1], reports[1:], []][int(drawn.variant * 3)]
    return reports


@dataclass(order=True, slots=True)
class _Waiting:
    due: float
    order: int
    report: Report = field(compare=False)
    give_up: float = field(compare=False)
    attempts: int = field(default=0, compare=False)
    then: Callable[[], None] | None = field(default=None, compare=False)


class Reporter:
    """Sends reports when they are due, while `run` runs.

    `counts` tells of reports: `planned`, `sent` (answered 200), `failed` (attempts), `given_up`
    and `dropped` (no room to wait).
    """

    def __init__(self, settings: Reports) -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter(planned=0, sent=0, failed=0, given_up=0, dropped=0)
        self._waiting: list[_Waiting] = []
        self._under_way = 0
        self._order = 0
        self._wake = asyncio.Event()

    @property
    def waiting(self) -> int:
        """How many reports are not sent yet, those under way included."""
        return len(self._waiting) + self._under_way

    def push(self, report: Report, then: Callable[[], None] | None = None) -> None:
        """Send a report after its delay, counted from now; `then` follows its first attempt.

        With no room left the report is dropped and `then` called at once.
        """
        self.counts["planned"] += 1
        if len(self._waiting) >= self.settings.capacity:
            self.counts["dropped"] += 1
            if then:
                then()
            return
        now = time.monotonic()
        # One that an answer waits for goes before all that is due.
        due = 0.0 if report.delay is None else now + report.delay
        give_up = now + (report.delay or 0.0) + self.settings.retry_for
        self._put(_Waiting(due, self._order, report, give_up, then=then))
        self._order += 1

    def reset(self) -> None:
        """Forget what waits and what was counted; what an answer waits for is let go."""
        waiting, self._waiting = self._waiting, []
        self.counts = Counter(dict.fromkeys(self.counts, 0))
        for item in waiting:
            if item.then:
                item.then()

    async def run(self) -> None:
        """Send until cancelled."""
        timeout = aiohttp.ClientTimeout(total=_ATTEMPT_SECONDS)
        # The number under way is bounded here; the pool needs no second bound.
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                self._wake.clear()
                wait = self._start_due(session, group)
                try:
                    async with asyncio.timeout(wait):
                        await self._wake.wait()
                except TimeoutError:
                    continue

    def _start_due(self, session: aiohttp.ClientSession, group: asyncio.TaskGroup) -> float | None:
        """Start what is due, as far as there is room; the seconds until the next is, if known."""
        while self._waiting and self._under_way < self.settings.concurrency:
            wait = self._waiting[0].due - time.monotonic()
            if wait > 0:
                return wait
            self._under_way += 1
            group.create_task(self._send(session, heappop(self._waiting)))
        return None

    async def _send(self, session: aiohttp.ClientSession, item: _Waiting) -> None:
        try:
            arrived = await self._attempt(session, item.report)
        finally:
            self._under_way -= 1
            self._wake.set()
        if item.then:
            item.then()
            item.then = None
        if arrived:
            self.counts["sent"] += 1
            return
        self.counts["failed"] += 1
        item.due = time.monotonic() + min(self.settings.retry_after * 2**item.attempts, _RETRY_MOST)
        item.attempts += 1
        if item.due > item.give_up:
            self.counts["given_up"] += 1
        else:
            self._put(item)

    async def _attempt(self, session: aiohttp.ClientSession, report: Report) -> bool:
        settings = self.settings
        if settings.url is None:
            return False
        parameters = {settings.id_param: report.identifier, settings.status_param: report.status}
        try:
            async with session.get(
                settings.url, params=parameters, allow_redirects=False
            ) as response:
                await response.content.read(_ANSWER_MAX)
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def _put(self, item: _Waiting) -> None:
        heappush(self._waiting, item)
        if self._waiting[0] is item:
            self._wake.set()
