"""Random histories of messages on the real SQL, against a plain model of the rules.

Users insert and cancel; workers claim, send, freeze, die and come back; answers come late, twice or
never; rescuers, operators and delivery reports do their part; weeks pass. After each step every row
and every count must be what the model says, and no message may have been asked for once too often.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, TypeVar

import asyncpg
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from dispatcher.db import egress, outbox, quota, repair, reports, workers
from dispatcher.db.pool import Session
from dispatcher.domain.message import Probe, Status
from dispatcher.domain.msisdn import normalise
from dispatcher.domain.outcomes import RELEASED, Outcome, Signal, classify, doubt, never_left
from tests.integration.peers import Connection, midweek

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])

HOLDS: Final = 1
RETRIES: Final = 2
SERVICES: Final = (HOLDS, RETRIES)
NUMBERS: Final = {"359881234567": True, "088 123 4567": True, "nobody": False}
REFUSALS: Final = (
    b"INVALID_MSISDN",
    b"INVALID_PATTERN",
    b"LIMIT_DELAY",
    b"BAN_IP_TEMP",
    b"LIMIT_DAY",
    b"LIMIT_WEEK",
)
COUNTED: Final = {"sending", "accepted", "enroute", "delivered", "undeliverable", "unknown"}
EARLIER: Final = "'2020-01-01'"
INDEX: Final = range(10**6)
"""Chooses one of however many there are."""


@dataclass
class Sms:
    """A message as the rules have it."""

    id: int
    service: int
    number: str
    priority: int
    runs_out: int | None
    """The week in which it is too late for it, or None."""
    read: bool
    status: str = "pending"
    claim_no: int = 0
    owner: int | None = None
    attempts: int = 0
    doubts: int = 0
    cancel: bool = False
    waits: bool = False
    """For its retry_at."""
    debits: list[int] = field(default_factory=list)
    """The weeks whose windows it counts in, once for each claim that was not refunded."""
    provider_id: str | None = None
    sent_again: int = 0
    """How often an operator has sent it again while it was in doubt."""
    marked: bool = False
    """An operator has said that it was sent."""
    requests: int = 0
    """How many have come to the provider without a refusal."""
    booked: int = 0


@dataclass
class Held:
    """A claimed message in the hands of its worker."""

    sms: Sms
    claim_no: int
    left: bool = False
    answer: bytes | None = None
    """What the provider says, None if it keeps silent."""


@dataclass
class Worker:
    """A process, with what it knows."""

    id: int
    runs: bool = True
    leased: bool = True
    held: list[Held] = field(default_factory=list)
    covered: set[tuple[int, int]] = field(default_factory=set)
    """What it claimed under its present lease."""
    owes: list[outbox.Result] = field(default_factory=list)
    """Results that are not known to be recorded."""


class World:
    """What outlives one history: an event loop and connections."""

    def __init__(self, dsn: str) -> None:
        self._runner = asyncio.Runner()
        self.session = Session(dsn, name="model", timeout=30)
        self.connection: Connection = self.do(asyncpg.connect(dsn))
        self.sql("SELECT pg_sleep_until(pg_postmaster_start_time() + interval '1 s')")

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to its end."""
        return self._runner.run(work)

    def sql(self, statement: str, *args: object) -> list[asyncpg.Record]:
        """Run a statement of a user or of the test."""
        return self.do(self.connection.fetch(statement, *args))

    def close(self) -> None:
        """End the connections."""
        self.do(self.session.close())
        self.do(self.connection.close())
        self._runner.close()


@dataclass(frozen=True)
class Event:
    """Something that may happen: how often, when it can, and with what."""

    weight: int
    when: Callable[[Any], object]
    drawn: dict[str, Sequence[Any]]
    name: str


EVENTS: Final[list[Event]] = []


def event(
    weight: int,
    when: Callable[[Any], object] = lambda _: True,
    **drawn: Sequence[Any],
) -> Callable[[F], F]:
    """Enter a method of the history among what may happen."""

    def enter(method: F) -> F:
        EVENTS.append(Event(weight, when, drawn, method.__name__))
        return method

    return enter


class Dispatcher(RuleBasedStateMachine):
    """One history."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.do, self.sql, self.session = world.do, world.sql, world.session
        self.messages: dict[int, Sms] = {}
        self.workers: list[Worker] = []
        self.spooled: list[outbox.Result] = []
        self.recorded: list[outbox.Result] = []
        self.limits: dict[int, int | None] = {HOLDS: 8, RETRIES: None}
        self.closed: set[int] = set()
        self.paused: set[int] = set()
        self.banned = False
        self.week = 0
        self.survey: dict[int, dict[int, outbox.Head]] = {}

    @initialize()
    def begin(self) -> None:
        """Empty tables, two services, two workers."""
        self.sql(
            "TRUNCATE outbox, service, pace, quota_usage, attempt, worker, egress, egress_service, "
            "delivery_report RESTART IDENTITY"
        )
        for service, on_unknown in ((HOLDS, "hold"), (RETRIES, "retry")):
            self.sql(
                "INSERT INTO service (service_id, user_id, timezone, on_unknown, week_limit) "
                "VALUES ($1, 7, $2, $3, $4)",
                service,
                midweek(),
                on_unknown,
                self.limits[service],
            )
        self._enter()
        self._enter()

    def _enter(self) -> None:
        worker = self.do(
            workers.enter(self.session, "default", host="model", pid=1, version="0", lease=1)
        )
        self.workers.append(Worker(worker))
        self._lease(worker, alive=True)

    def _lease(self, worker: int, *, alive: bool) -> None:
        # So short that the server has run for longer, as a rescuer demands.
        self.sql(
            "UPDATE worker SET lease = '1 s', "
            "lease_until = clock_timestamp() + make_interval(hours => $2) WHERE id = $1",
            worker,
            1 if alive else -1,
        )

    @rule(seed=st.integers(0, 2**64 - 1))
    def happen(self, seed: int) -> None:
        """One thing happens, chosen by a number.

        One rule for all, and one number: left to choose between rules and arguments itself,
        hypothesis writes mostly histories in which nothing comes of anything.
        """
        chance = Random(seed)
        possible = [one for one in EVENTS if one.when(self)]
        (chosen,) = chance.choices(possible, [one.weight for one in possible])
        drawn = {key: chance.choice(among) for key, among in chosen.drawn.items()}
        note(f"{chosen.name} {drawn}")
        getattr(self, chosen.name)(**drawn)

    # -------------------------------------------------------------- users

    @event(
        3,
        when=lambda self: len(self._with_status("pending")) < 6,
        service=SERVICES,
        number=["359881234567"] * 4 + list(NUMBERS),
        priority=range(2),
        count=range(1, 4),
        weeks=[None, None, None, 1, 1, 0],
    )
    def insert(
        self, service: int, number: str, priority: int, count: int, weeks: int | None
    ) -> None:
        """A user inserts messages; some run out within the week, or have already."""
        rows = self.sql(
            f"""
            INSERT INTO outbox (service_id, msisdn, text, priority, send_after, expires_at)
            SELECT $1, $2, 'x', $3, {EARLIER},
                clock_timestamp() + ($5::integer * 7 - 1) * interval '1 day'
            FROM generate_series(1, $4::integer)
            RETURNING id
            """,  # noqa: S608 - a constant
            service,
            number,
            priority,
            count,
            weeks,
        )
        for row in rows:
            self.messages[row["id"]] = Sms(
                id=row["id"],
                service=service,
                number=number,
                priority=priority,
                runs_out=None if weeks is None else self.week + weeks,
                read=number.isdigit(),
            )

    @event(1, when=lambda self: self._with_status("pending"), index=INDEX)
    def cancel(self, index: int) -> None:
        """A user cancels what waits, in plain SQL."""
        sms = self._choose(self.messages.values(), index)
        self.sql(
            "UPDATE outbox SET status = 'cancelled' WHERE id = $1 AND status = 'pending'", sms.id
        )
        if sms.status == "pending":
            sms.status = "cancelled"

    # -------------------------------------------------------------- workers

    @event(
        8,
        index=INDEX,
        service=SERVICES,
        places=range(1, 5),
        heard=[True, True, True, False],
        from_heads=[False, True],
    )
    def claim(
        self, index: int, service: int, places: int, *, heard: bool, from_heads: bool
    ) -> None:
        """A worker claims; sometimes it does not hear what it got."""
        worker = self._choose([w for w in self.workers if w.runs], index)
        eligible = [
            sms
            for sms in self.messages.values()
            if sms.service == service and sms.status == "pending" and not sms.waits
        ]
        left = self._left(service)
        places_allowed = max(0, places if left is None else min(places, left))
        shut = self.banned or service in self.paused or not worker.leased
        expected = 0 if shut else min(places_allowed, len(eligible))
        self.do(quota.open_windows(self.session, [service]))
        claim = self.do(
            outbox.claim(
                self.session,
                worker.id,
                {service: places},
                heads=self.survey if from_heads else {},
            )
        )
        picked = [self.messages[r["id"]] for r in (*claim.sending, *claim.refused, *claim.unread)]
        if from_heads:
            assert len(picked) <= expected
        else:
            assert len(picked) == expected
            first = sorted((sms.priority for sms in eligible), reverse=True)[:expected]
            assert Counter(sms.priority for sms in picked) == Counter(first), "priority"
        assert all(sms in eligible for sms in picked)
        for row in claim.sending:
            sms = self.messages[row["id"]]
            assert sms.read, "sent to a number that nobody has read"
            assert not self._late(sms), "too late"
            assert row["number"] == normalise(sms.number, "BG")
            assert sms.requests <= sms.doubts + sms.sent_again, "asked for once too often"
            sms.status, sms.owner = "sending", worker.id
            sms.claim_no += 1
            assert row["claim_no"] == sms.claim_no
            sms.debits.append(self.week)
            if heard:
                worker.held.append(Held(sms, sms.claim_no))
                worker.covered.add((sms.id, sms.claim_no))
        for row in claim.refused:
            sms = self.messages[row["id"]]
            assert self._late(sms)
            sms.status = "unknown" if sms.doubts else "expired"
        numbers = {(r["id"], r["msisdn"]): normalise(r["msisdn"], "BG") for r in claim.unread}
        self.do(outbox.read_numbers(self.session, numbers))
        for message_id, written in numbers:
            sms = self.messages[message_id]
            assert not sms.read
            assert not self._late(sms)
            if NUMBERS[written]:
                sms.read = True
            else:
                sms.status = "rejected"

    @event(1)
    def look(self) -> None:
        """A survey; claims go by it long after."""
        found = self.do(outbox.waiting(self.session, "default"))
        due = {s.service for s in self.messages.values() if s.status == "pending" and not s.waits}
        assert {w.service_id for w in found} == due
        self.survey = {w.service_id: w.heads for w in found}

    @event(
        12,
        when=lambda self: self._sendable(),
        index=INDEX,
        answer=[b"MSG_OK", b"MSG_OK:id", None, *REFUSALS],
    )
    def leave(self, index: int, answer: bytes | None) -> None:
        """A request leaves, if its worker may send; the provider makes up its mind."""
        held = self._choose(self._sendable(), index)
        sms = held.sms
        assert (sms.status, sms.claim_no) == ("sending", held.claim_no), "not its own any more"
        assert sms.requests <= sms.doubts + sms.sent_again, "asked for once too often"
        held.left = True
        held.answer = answer
        if answer == b"MSG_OK:id":
            held.answer = b"MSG_OK:%d-%d" % (sms.id, held.claim_no)
        if answer not in REFUSALS:
            sms.requests += 1
            sms.booked += answer is not None

    @event(12, when=lambda self: self._held(), index=INDEX, heard=[False, True], wait=[False, True])
    def settle(self, index: int, *, heard: bool, wait: bool) -> None:
        """A worker learns what became of a message, or gives it up."""
        worker, held = self._choose(self._held(), index)
        worker.held.remove(held)
        outcome: Outcome
        if not held.left:
            outcome = never_left("x") if wait else RELEASED
        elif held.answer is None or not heard:
            outcome = doubt("x")
        else:
            outcome = classify(200, held.answer)
        worker.owes.append(
            outbox.Result(
                held.sms.id,
                held.claim_no,
                worker.id,
                held.sms.service,
                outcome,
                3600.0 if outcome.status is Status.PENDING and not held.left and wait else None,
                sent_ago=0.1 if held.left else None,
            )
        )

    @event(
        12,
        when=lambda self: any(worker.owes for worker in self.workers),
        index=INDEX,
        count=range(1, 6),
        heard=[True, True, False],
    )
    def record(self, index: int, count: int, *, heard: bool) -> None:
        """A worker records; if it does not hear that it did, it will again."""
        worker = self._choose([worker for worker in self.workers if worker.owes], index)
        self._record(worker.owes[:count])
        if heard:
            del worker.owes[:count]

    @event(1, when=lambda self: self.recorded, index=INDEX)
    def record_long_after(self, index: int) -> None:
        """A statement that was on its way for long comes at last, and changes nothing."""
        before = self._rows()
        assert self.do(outbox.record(self.session, [self._choose(self.recorded, index)])) == {}
        assert self._rows() == before

    @event(1, index=INDEX)
    def return_lost_claims(self, index: int) -> None:
        """A worker gives back what the database says it holds and it does not know of."""
        worker = self._choose([w for w in self.workers if w.runs], index)
        known = {(held.sms.id, held.claim_no) for held in worker.held}
        known |= {(result.id, result.claim_no) for result in worker.owes}
        lost = [
            outbox.Result(row["id"], row["claim_no"], worker.id, row["service_id"], RELEASED)
            for row in self.do(outbox.held(self.session, worker.id, rescued=True))
            if (row["id"], row["claim_no"]) not in known
        ]
        if lost:
            self._record(lost)

    @event(1, index=INDEX)
    def lapse(self, index: int) -> None:
        """A worker is frozen, or cut off, for longer than its lease."""
        worker = self._choose(self.workers, index)
        worker.leased = False
        self._lease(worker.id, alive=False)

    @event(2, index=INDEX)
    def beat(self, index: int) -> None:
        """A worker beats; after a gap nothing that it claimed before is covered."""
        worker = self._choose([w for w in self.workers if w.runs], index)
        assert self.do(workers.beat(self.session, worker.id)) is worker.leased
        if not worker.leased:
            worker.covered.clear()
        worker.leased = True
        self._lease(worker.id, alive=True)

    @event(1, index=INDEX, spools=[False, True])
    def die(self, index: int, *, spools: bool) -> None:
        """A worker ends, with or without a spool; another takes its place."""
        worker = self._choose([w for w in self.workers if w.runs], index)
        worker.runs = worker.leased = False
        self._lease(worker.id, alive=False)
        if spools:
            self.spooled += worker.owes
        worker.held.clear()
        worker.owes.clear()
        self._enter()

    @event(4, when=lambda self: self.spooled)
    def take_up(self) -> None:
        """What was spooled is recorded at another's start."""
        self._record(self.spooled)
        self.spooled = []

    # -------------------------------------------------------------- everybody's duties

    @event(6, when=lambda self: self._with_status("sending"))
    def rescue(self) -> None:
        """What silent workers hold is in doubt."""
        silent = {worker.id for worker in self.workers if not worker.leased}
        lost = {s.id for s in self.messages.values() if s.status == "sending" and s.owner in silent}
        assert {row["id"] for row in self.do(outbox.rescue(self.session))} == lost
        for message_id in lost:
            sms = self.messages[message_id]
            sms.status, sms.waits = "unknown", False
            sms.attempts += 1

    @event(6, when=lambda self: self._with_status("unknown"))
    def retry(self) -> None:
        """What is in doubt goes again, where the service says so, at most three times."""
        again = {
            sms.id
            for sms in self.messages.values()
            if sms.service == RETRIES
            and sms.status == "unknown"
            and sms.doubts < 3
            and not sms.cancel
            and not self._late(sms)
        }
        assert {row["id"] for row in self.do(outbox.retry_unknown(self.session, 0.0))} == again
        for message_id in again:
            sms = self.messages[message_id]
            sms.status, sms.waits = "pending", False
            sms.doubts += 1

    @event(1, when=lambda self: self._with_status("pending"))
    def expire(self) -> None:
        """What ran out while it waited is ended."""
        late = {s.id for s in self.messages.values() if s.status == "pending" and self._late(s)}
        assert {row["id"] for row in self.do(outbox.expire(self.session))} == late
        for message_id in late:
            sms = self.messages[message_id]
            sms.status = "unknown" if sms.doubts else "expired"

    @event(
        2,
        when=lambda self: self._identified(),
        index=INDEX,
        word=[Status.ENROUTE, Status.DELIVERED],
    )
    def report(self, index: int, word: Status) -> None:
        """A delivery report comes, perhaps before the acceptance is recorded."""
        identifier, sms = self._choose(self._identified(), index)
        self.do(reports.receive(self.session, [reports.Report(identifier, word, "{}")]))
        if sms.provider_id == identifier:
            self._advance(sms, word)

    @event(1, when=lambda self: self._identified())
    def apply_reports(self) -> None:
        """Reports that waited meet their messages."""
        applied = self.do(reports.apply(self.session, 3600.0)).applied
        for one in applied:
            assert one.message_id is not None
            assert one.status is not None
            self._advance(self.messages[one.message_id], one.status)

    # -------------------------------------------------------------- operators

    @event(1, when=lambda self: self.messages, index=INDEX, action=list(repair.Action))
    def operate(self, index: int, action: repair.Action) -> None:
        """An operator settles a message by hand."""
        sms = self._choose(self.messages.values(), index)
        alive = {worker.id for worker in self.workers if worker.leased}
        held = action is not repair.Action.CANCEL and sms.owner in alive
        sends = action in {repair.Action.SEND_AGAIN, repair.Action.RETRY}
        meant = sms.status in [status.value for status in action.statuses]

        async def act() -> list[repair.Step]:
            return [step async for step in repair.act(self.session, action, [sms.id])]

        (step,) = self.do(act())
        if not meant:
            assert (step.changed, step.held, step.too_late) == ({}, [], [])
        elif held:
            assert step.held == [(sms.id, sms.owner)]
        elif sends and self._late(sms):
            assert step.too_late == [sms.id]
        else:
            assert step.changed == {sms.id: Status(sms.status)}
            self._repaired(sms, action)

    def _repaired(self, sms: Sms, action: repair.Action) -> None:
        match action:
            case repair.Action.MARK_SENT:
                sms.status, sms.owner, sms.marked, sms.waits = "accepted", None, True, False
            case repair.Action.CANCEL:
                sms.status = "cancelled" if sms.status == "pending" else sms.status
                sms.cancel = True
            case _:
                if sms.status == "unknown":
                    sms.sent_again += 1
                if sms.status != "pending":
                    sms.owner = None
                sms.status, sms.cancel, sms.waits = "pending", False, False
                sms.read = sms.number.isdigit()

    @event(1, limit=[None, 20, 8, 4, 2, 0])
    def set_limit(self, limit: int | None) -> None:
        """An operator sets another limit, also below what is used."""
        self.sql("UPDATE service SET week_limit = $1 WHERE service_id = $2", limit, HOLDS)
        self.limits[HOLDS] = limit

    @event(1, service=SERVICES, paused=[False] * 5 + [True])
    def pause(self, service: int, *, paused: bool) -> None:
        """An operator pauses a service, or lets it go on."""
        self.sql("UPDATE service SET paused = $1 WHERE service_id = $2", paused, service)
        (self.paused.add if paused else self.paused.discard)(service)

    # -------------------------------------------------------------- the world

    @event(1, banned=[False] * 5 + [True])
    def ban(self, *, banned: bool) -> None:
        """The provider bans our address, or lets us in again."""
        (found,) = self.sql("SELECT ban_episode, banned_until, ill_until FROM egress")
        if banned:
            self.do(egress.ban(self.session, "default", found["ban_episode"], 3600, 1))
        else:
            self.do(egress.resume(self.session, "default", Probe(*found)))
        self.banned = banned

    @event(1)
    def week_passes(self) -> None:
        """A week goes by: everything that is written down is a week older."""
        self.week += 1
        self.closed.clear()
        for days in (-7007, 7000):  # far off first, lest two windows meet on the way
            self.sql(
                "UPDATE quota_usage SET window_start = window_start + make_interval(days => $1), "
                "closed_until = closed_until + make_interval(days => $1)",
                days,
            )
        self.sql(
            """
            UPDATE outbox SET
                claimed_at = claimed_at - interval '7 days',
                retry_at = retry_at - interval '7 days',
                expires_at = expires_at - interval '7 days'
            """
        )
        for sms in self.messages.values():
            sms.waits = False

    # -------------------------------------------------------------- the rules

    def _record(self, results: list[outbox.Result]) -> None:
        spent = {Signal.DAY_SPENT: "day", Signal.WEEK_SPENT: "week"}
        for result in results:
            sms = self.messages[result.id]
            period = spent.get(result.outcome.signal) if result.outcome.signal else None
            if period is not None:
                self.do(quota.close_window(self.session, result.id, result.claim_no, period))
                if sms.claim_no == result.claim_no and sms.debits[-1:] == [self.week]:
                    self.closed.add(sms.service)
        written = self.do(outbox.record(self.session, results))
        expected = set()
        for result in results:
            sms = self.messages[result.id]
            if (sms.claim_no, sms.owner) == (result.claim_no, result.worker_id):
                expected.add((result.id, result.claim_no))
                self._recorded(sms, result)
        assert set(written) == expected
        self.recorded += results

    def _recorded(self, sms: Sms, result: outbox.Result) -> None:
        outcome, was = result.outcome, sms.status
        if outcome.status is Status.UNKNOWN and was != "sending":
            sms.status = was
        elif outcome.status is Status.EXPIRED and sms.doubts:
            sms.status = "unknown"
        elif outcome.status is not Status.PENDING:
            sms.status = outcome.status.value
        elif sms.cancel:
            sms.status = "cancelled"
        elif was not in {"cancelled", "expired"}:
            sms.status = "pending"
        sms.attempts += outcome.counts_attempt - (was != "sending")
        sms.waits = result.retry_in is not None
        sms.owner = None
        sms.provider_id = outcome.provider_id
        if not outcome.costs_quota:
            sms.debits.pop()

    def _advance(self, sms: Sms, word: Status) -> None:
        if (sms.status, word) in {
            ("accepted", Status.ENROUTE),
            ("accepted", Status.DELIVERED),
            ("enroute", Status.DELIVERED),
        }:
            sms.status = word.value

    def _with_status(self, status: str) -> list[Sms]:
        return [sms for sms in self.messages.values() if sms.status == status]

    def _held(self) -> list[tuple[Worker, Held]]:
        return [(worker, held) for worker in self.workers for held in worker.held]

    def _sendable(self) -> list[Held]:
        return [
            held
            for worker, held in self._held()
            if worker.leased and not held.left and (held.sms.id, held.claim_no) in worker.covered
        ]

    def _identified(self) -> list[tuple[str, Sms]]:
        """Identifiers that the provider has given, known to us or not yet."""
        told = [(sms.provider_id, sms) for sms in self.messages.values() if sms.provider_id]
        told += [
            (held.answer[7:].decode(), held.sms)
            for _, held in self._held()
            if held.answer is not None and held.answer.startswith(b"MSG_OK:")
        ]
        return told

    def _late(self, sms: Sms) -> bool:
        return sms.runs_out is not None and sms.runs_out <= self.week

    def _used(self, service: int, week: int) -> int:
        return sum(s.debits.count(week) for s in self.messages.values() if s.service == service)

    def _left(self, service: int) -> int | None:
        if service in self.closed:
            return 0
        limit = self.limits[service]
        return None if limit is None else limit - self._used(service, self.week)

    def _choose(self, some: Any, index: int) -> Any:
        found = list(some)
        return found[index % len(found)] if found else None

    def _rows(self) -> list[asyncpg.Record]:
        return self.sql("SELECT * FROM outbox ORDER BY id") + self.sql(
            "SELECT * FROM quota_usage ORDER BY service_id, period, window_start"
        )

    # -------------------------------------------------------------- what must hold

    @invariant()
    def every_row_is_as_the_rules_say(self) -> None:
        """Status, owner, claim, attempts, and what waits."""
        rows = self.sql(
            "SELECT *, coalesce(retry_at > clock_timestamp(), false) AS waits FROM outbox"
        )
        assert {row["id"] for row in rows} == set(self.messages)
        for row in rows:
            sms = self.messages[row["id"]]
            stored = {
                "status": row["status"],
                "claim_no": row["claim_no"],
                "attempts": row["attempts"],
                "doubts": row["doubts"],
                "cancel": row["cancel"],
                "owner": row["worker_id"],
                "provider_id": row["provider_id"],
            }
            assert stored == {name: getattr(sms, name) for name in stored}, sms
            if sms.status == "pending":
                assert row["waits"] == sms.waits, sms

    @invariant()
    def counts_are_exact(self) -> None:
        """Each week's window counts what was claimed in it and not given back."""
        for service in SERVICES:
            rows = self.sql(
                """
                SELECT round(extract(epoch FROM date_trunc('week', now(), s.timezone)
                    - q.window_start) / 604800)::integer AS ago, q.used
                FROM quota_usage q
                JOIN service s USING (service_id)
                WHERE q.service_id = $1 AND q.period = 'week' AND q.used <> 0
                """,
                service,
            )
            used = Counter({week: self._used(service, week) for week in range(self.week + 1)})
            assert {self.week - row["ago"]: row["used"] for row in rows} == dict(+used)

    @invariant()
    def nothing_is_sent_twice_or_lost(self) -> None:
        """What the provider has is known, in doubt or on its way; and it has it once."""
        owed = {r.id for worker in self.workers for r in worker.owes}
        owed |= {r.id for r in self.spooled}
        owed |= {held.sms.id for worker in self.workers for held in worker.held}
        for sms in self.messages.values():
            again = sms.doubts + sms.sent_again
            assert sms.requests <= 1 + again, sms
            if sms.status in {"accepted", "enroute", "delivered"}:
                assert sms.booked or sms.marked, f"a false success: {sms}"
            elif sms.requests > again:
                assert sms.status in COUNTED, f"sent, and its status does not tell: {sms}"


@pytest.mark.parametrize(
    ("histories", "steps"),
    [
        pytest.param(25, 40, id="few", marks=pytest.mark.timeout(400)),
        pytest.param(500, 60, id="many", marks=[pytest.mark.faults, pytest.mark.timeout(1500)]),
    ],
)
def test_histories(database: str, histories: int, steps: int) -> None:
    """Whatever happens in whatever order, rows, counts and the provider's books agree."""
    world = World(database)

    class History(Dispatcher):
        def __init__(self) -> None:
            super().__init__(world)

    try:
        run_state_machine_as_test(
            History,
            settings=settings(
                max_examples=histories,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        world.close()
