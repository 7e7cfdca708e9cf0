"""The way of a claimed message: to its slot, to the provider, and its outcome to the recorder."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from functools import partial
from random import random
from typing import Final

import structlog

from dispatcher import clock
from dispatcher.breaker import Breaker, Settled
from dispatcher.domain import outcomes
from dispatcher.domain.message import Message
from dispatcher.domain.retry import message_delay
from dispatcher.lease import Lease
from dispatcher.pacing import APPROACH, Pacer, Slot, until
from dispatcher.provider import Answer, InDoubt, NeverLeft, Provider, Reply
from dispatcher.recorder import Recorder

AHEAD: Final = 0.03
"""Seconds of sending that are claimed ahead, so that no place waits for a claim."""

AT_MOST_AHEAD: Final = 3 / 4
"""Messages claimed ahead, as a share of the places; each is in doubt if this process is killed."""

POISONED: Final = 3
"""How often a message may make our own code fail before it is refused."""

STOPPING: Final = "the worker stops"
RECALLED: Final = "some messages were cancelled"
SHUT: Final = "the egress is closed"
LEASE_LOST: Final = "the lease has run out"
WINDOW_OVER: Final = "its quota window is over"
OVERDUE: Final = "its expires_at has passed"
PACE_LOST: Final = "it missed its slot"

log = structlog.stdlib.get_logger()


class Sender:
    """Sends what was claimed, each message once or not at all, as many at once as may be."""

    def __init__(
        self,
        places: int,
        *,
        lease: Lease,
        breaker: Breaker,
        provider: Provider,
        pacer: Pacer,
        freed: Callable[[], None],
    ) -> None:
        """Prepare to send.

        Args:
            places: Requests under way at most.
            lease: Covers what may leave.
            breaker: Knows whether the egress is open.
            provider: What it is sent with.
            pacer: Keeps messages with a slot apart.
            freed: Called when there may be room for another message.
        """
        self._all_places = self._places = places
        self._lease = lease
        self._breaker = breaker
        self._provider = provider
        self._pacer = pacer
        self._freed = freed
        self._paced: deque[tuple[Message, Slot | None]] = deque()
        self._unpaced: deque[tuple[Message, Slot | None]] = deque()
        self.tasks: set[asyncio.Task[None]] = set()
        """The messages in flight or waiting for their slot."""
        self.held: dict[tuple[int, int], Message] = {}
        """Claimed and not yet recorded, by identifier and claim."""
        self.held_by_service: Counter[int] = Counter()
        """How many of them each service has."""
        self._sending: dict[tuple[int, int], Message] = {}
        self._left: set[tuple[int, int]] = set()
        self._stopping = False
        self._recalled_at = 0.0
        self._awaiting_slot = 0
        self._answered = 0
        self._rate = 0.0
        self._rated_at = clock.now()

    def run_in(self, group: asyncio.TaskGroup, recorder: Recorder) -> None:
        """Say where messages are sent from and where their outcomes go, before the first."""
        self._group = group
        self._recorder = recorder

    @property
    def in_flight(self) -> int:
        """Messages whose outcome is not known yet."""
        return len(self._sending)

    def free(self) -> int:
        """How many messages may be claimed now."""
        now = clock.now()
        if now - self._rated_at >= 0.1:
            self._rate = self._answered / (now - self._rated_at)
            self._answered, self._rated_at = 0, now
        most = self._all_places
        ahead = int(min(most * AT_MOST_AHEAD, self._rate * AHEAD))
        return min(
            most + ahead - (len(self._sending) - self._awaiting_slot),
            2 * most - len(self.held),
        )

    def begin(self, message: Message) -> None:
        """Take a message that was claimed, and send it."""
        key = (message.id, message.claim_no)
        self.held[key] = self._sending[key] = message
        self.held_by_service[message.service_id] += 1
        if message.slot is None:
            self._start(message, None)
        else:
            slot = Slot(message.service_id, message.slot, message.delay, last=message.last_slot)
            self._spawn(self._approach(message, slot))

    def recall(self) -> None:
        """Give back what has not left: some of it was cancelled."""
        self._recalled_at = clock.now()

    def stop(self) -> None:
        """Let nothing leave that has not left."""
        self._stopping = True

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._group.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _approach(self, message: Message, slot: Slot) -> None:
        self._awaiting_slot += 1
        try:
            await until(slot.at - APPROACH)
        finally:
            self._awaiting_slot -= 1
        self._start(message, slot)

    def _start(self, message: Message, slot: Slot | None) -> None:
        """Send a message if there is a place for it, or as soon as there is one."""
        if self._places > 0:
            self._places -= 1
            self._spawn(self._keep_sending(message, slot))
        else:
            (self._unpaced if slot is None else self._paced).append((message, slot))

    async def _keep_sending(self, message: Message, slot: Slot | None) -> None:
        """Send one message after the other, those that have a slot first, while any waits.

        A task and a semaphore for each message took a fifteenth of the worker's time, measured.
        """
        try:
            while True:
                await self._send(message, slot)
                waiting = self._paced or self._unpaced
                if not waiting:
                    return
                message, slot = waiting.popleft()
        finally:
            self._places += 1

    async def _send(self, message: Message, slot: Slot | None) -> None:
        key = (message.id, message.claim_no)
        try:
            reply = await self._provider.send(
                user_id=message.user_id,
                service_id=message.service_id,
                msisdn=message.msisdn,
                text=message.text,
                extended=message.extended,
                check=partial(self._refusal, message, slot),
                wait=None if slot is None else partial(self._pacer.wait, slot),
            )
        except Exception as error:  # noqa: BLE001 - see _poisoned
            settled = self._poisoned(message, error)
        else:
            settled = self._settled(message, reply)
        if slot is not None and slot.missed:
            log.debug("slot.missed", id=message.id, times=slot.missed)
        self._left.discard(key)
        if self._sending.pop(key, None) is None:
            return  # abandoned at the end of the drain time, and told so
        self._answered += 1
        self._recorder.put(settled)
        self._freed()

    def _refusal(self, message: Message, slot: Slot | None) -> str | None:
        """Why a message may not leave now; asked directly before its first byte would."""
        now = clock.now()
        if self._stopping:
            return STOPPING
        if message.claimed_at <= self._recalled_at:
            return RECALLED
        if not self._breaker.open and not message.egress_probe:
            return SHUT
        if not self._lease.covers(message.claimed_at, now):
            return LEASE_LOST
        if message.send_before is not None and now >= message.send_before:
            return WINDOW_OVER
        if message.expires is not None and now >= message.expires:
            return OVERDUE
        if slot is not None and slot.lost:
            return PACE_LOST
        self._left.add((message.id, message.claim_no))
        return None

    def _settled(self, message: Message, reply: Reply) -> Settled:
        match reply:
            case Answer():
                outcome = outcomes.classify(reply.status, reply.body)
                return Settled(
                    message,
                    outcome,
                    answered=not outcome.in_doubt,
                    left_at=clock.now() - reply.seconds,
                    seconds=reply.seconds,
                )
            case InDoubt(reason=reason, seconds=seconds, received=received):
                return Settled(
                    message,
                    outcomes.doubt(
                        f"No whole answer came ({reason}).",
                        outcomes.printable(received) if received else None,
                    ),
                    answered=False,
                    left_at=clock.now() - seconds,
                    seconds=seconds,
                )
            case NeverLeft(reason=reason, withheld=True):
                expired = outcomes.EXPIRED_IN_DOUBT if message.doubted else outcomes.EXPIRED
                return Settled(
                    message,
                    expired if reason == OVERDUE else outcomes.RELEASED,
                    answered=False,
                    withheld=True,
                )
            case NeverLeft(reason=reason):
                return Settled(
                    message,
                    outcomes.never_left(reason),
                    answered=False,
                    failed=True,
                    unreached=True,
                    retry_in=message_delay(message.failures + 1, random()),
                )

    def _poisoned(self, message: Message, error: Exception) -> Settled:
        """A message that makes our own code fail must not stop the others, nor go round for ever.

        The client raises only before the first byte, so it certainly did not leave.
        """
        log.error("message.failed", id=message.id, service_id=message.service_id, exc_info=error)
        if message.failures + 1 >= POISONED:
            reason = f"The dispatcher itself failed on it ({type(error).__name__}); see its log."
            return Settled(message, outcomes.refused(reason), answered=False)
        return Settled(
            message,
            outcomes.never_left(f"the dispatcher itself failed: {type(error).__name__}"),
            answered=False,
            failed=True,
            retry_in=message_delay(message.failures + 1, random()),
        )

    def abandon(self) -> list[Settled]:
        """Settle what is still in flight when the drain time is over.

        What has left is in doubt, for its answer is lost; the rest can leave no more, for the
        worker has stopped.
        """
        settled = [
            Settled(
                message,
                outcomes.doubt("The worker stopped before an answer came."),
                answered=False,
            )
            if key in self._left
            else Settled(message, outcomes.RELEASED, answered=False, withheld=True)
            for key, message in self._sending.items()
        ]
        self._sending.clear()
        return settled

    def released(self, settled: Settled) -> None:
        """A result is durable: its message is held no more."""
        message = settled.message
        if self.held.pop((message.id, message.claim_no), None) is not None:
            self.held_by_service[message.service_id] -= 1
            if not self.held_by_service[message.service_id]:
                del self.held_by_service[message.service_id]
        self._freed()
