"""What the provider has received: per message, per service, and a log of every request."""

import json
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import NamedTuple, TypedDict

from dispatcher.simulator.faults import Fault
from dispatcher.simulator.rules import Answer, Request

DOUBLES_SHOWN = 1000


class MessageSummary(TypedDict):
    """One message: how many requests came for it and what became of them.

    `accepted` counts those that the provider took, `swallowed` those that ended without an answer
    and without being taken, which a client cannot tell from taken ones.
    """

    service_id: str | None
    msisdn: str | None
    text: str | None
    requests: int
    accepted: int
    swallowed: int


class ServiceSummary(TypedDict):
    """One service; spacings in seconds between arrivals, null with fewer than two.

    `min_spacing` is between any two requests that reached the rules, `min_spacing_accepted`
    between accepted ones; `accepted_span` lies between the first accepted and the last.
    """

    requests: int
    accepted: int
    answers: dict[str, int]
    refused_for_delay: int
    min_spacing: float | None
    min_spacing_accepted: float | None
    accepted_span: float | None


class Summary(TypedDict):
    """All that was received so far.

    `messages` is how many distinct ones, `repeated` how many of these were asked for more than
    once, `received_twice` how many were accepted or swallowed more than once; `doubles` shows
    the latter, at most DOUBLES_SHOWN of them.
    """

    requests: int
    malformed: int
    accepted: int
    answers: dict[str, int]
    faults: dict[str, int]
    messages: int
    repeated: int
    received_twice: int
    doubles: list[MessageSummary]
    services: dict[str, ServiceSummary]


Message = tuple[str | None, str | None, str | None]


class Entry(NamedTuple):
    """One request in the log; `answer` is None when it was swallowed, `n` its arrival number."""

    n: int
    wall: float
    monotonic: float
    ip: str
    request: Request
    answer: str | None
    fault: Fault | None


@dataclass(slots=True)
class _Tally:
    requests: int = 0
    accepted: int = 0
    swallowed: int = 0


class _Spacing:
    """The least distance between arrivals."""

    __slots__ = ("first", "last", "least")

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None
        self.least: float | None = None

    def note(self, now: float) -> None:
        if self.first is None or self.last is None:
            self.first = now
        else:
            gap = now - self.last
            self.least = gap if self.least is None else min(gap, self.least)
        self.last = now

    @property
    def span(self) -> float | None:
        if self.first is None or self.last is None or self.least is None:
            return None
        return self.last - self.first


class _Service:
    __slots__ = ("accepted", "answers", "requests")

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.requests = _Spacing()
        self.accepted = _Spacing()

    def summary(self) -> ServiceSummary:
        return {
            "requests": self.answers.total(),
            "accepted": self.answers[Answer.MSG_OK],
            "answers": dict(self.answers),
            "refused_for_delay": self.answers[Answer.LIMIT_DELAY],
            "min_spacing": self.requests.least,
            "min_spacing_accepted": self.accepted.least,
            "accepted_span": self.accepted.span,
        }


class Received:
    """The record of all requests for a message.

    Memory grows with distinct messages, by less than a kilobyte each, so that 'once' can be
    proved over a whole run; the log keeps the newest `log_size` requests. A summary costs the
    same however much was received, so that asking for it does not hold up a fast run.
    """

    def __init__(self, log_size: int) -> None:
        self.requests = 0
        self.malformed = 0
        self._answers: Counter[str] = Counter()
        self._faults: Counter[str] = Counter()
        self._accepted = 0
        self._repeated = 0
        self._tallies: dict[Message, _Tally] = {}
        self._doubles: dict[Message, _Tally] = {}
        self._services: dict[str, _Service] = {}
        self._log: deque[Entry] = deque(maxlen=log_size)

    def begin(self, request: Request) -> int:
        """Count a request that has arrived; how many for the same message, this one included."""
        self.requests += 1
        key = (request.service_id, request.msisdn, request.text)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = _Tally()
        tally.requests += 1
        if tally.requests == 2:
            self._repeated += 1
        return tally.requests

    def end(
        self,
        request: Request,
        ip: str,
        answer: Answer | None,
        line: str | None,
        fault: Fault | None,
        *,
        wall: float,
        now: float,
    ) -> None:
        """Record what became of a request: the rules' answer and its line, None if swallowed."""
        key = (request.service_id, request.msisdn, request.text)
        tally = self._tallies[key]
        if fault is not None:
            self._faults[fault] += 1
        else:
            self._answers[answer or ""] += 1
        if answer is None:
            tally.swallowed += 1
        else:
            service = self._services.get(request.service_id or "")
            if service is None:
                service = self._services[request.service_id or ""] = _Service()
            service.answers[answer] += 1
            service.requests.note(now)
            if answer is Answer.MSG_OK:
                tally.accepted += 1
                self._accepted += 1
                service.accepted.note(now)
        if tally.accepted + tally.swallowed > 1:
            self._doubles[key] = tally
        self._log.append(Entry(self.requests, wall, now, ip, request, line, fault))

    def summary(self) -> Summary:
        """The state of things now."""
        shown = islice(self._doubles.items(), DOUBLES_SHOWN)
        return {
            "requests": self.requests,
            "malformed": self.malformed,
            "accepted": self._accepted,
            "answers": dict(self._answers),
            "faults": dict(self._faults),
            "messages": len(self._tallies),
            "repeated": self._repeated,
            "received_twice": len(self._doubles),
            "doubles": [_message(key, tally) for key, tally in shown],
            "services": {name: service.summary() for name, service in self._services.items()},
        }

    def lines(self, after: int = 0) -> Iterator[str]:
        """The log as JSON lines, from the request that followed number `after`."""
        for entry in self._log:
            if entry.n > after:
                yield _line(entry)


def _message(key: Message, tally: _Tally) -> MessageSummary:
    return {
        "service_id": key[0],
        "msisdn": key[1],
        "text": key[2],
        "requests": tally.requests,
        "accepted": tally.accepted,
        "swallowed": tally.swallowed,
    }


def _line(entry: Entry) -> str:
    request = entry.request
    return json.dumps(
        {
            "n": entry.n,
            "time": datetime.fromtimestamp(entry.wall, UTC).isoformat(),
            "monotonic": entry.monotonic,
            "ip": entry.ip,
            "user_id": request.user_id,
            "service_id": request.service_id,
            "msisdn": request.msisdn,
            "text": request.text,
            "extended": request.extended == "yes",
            "answer": entry.answer,
            "fault": entry.fault,
        },
        ensure_ascii=False,
    )
