"""Puts the parts together: starts them in order, stops them in reverse."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from functools import partial
from typing import Final

import structlog

from dispatcher import __version__, clock, heartbeat, logs, spool, supervisor
from dispatcher.breaker import Breaker
from dispatcher.db import schema, workers
from dispatcher.db.listen import listen
from dispatcher.db.pool import DatabaseClock, DatabaseLost, Session
from dispatcher.db.prune import prune
from dispatcher.embedded import EmbeddedPostgres
from dispatcher.lease import Lease
from dispatcher.metrics import Metrics
from dispatcher.provider import Provider
from dispatcher.recorder import Recorder
from dispatcher.rescuer import Rescuer
from dispatcher.server import CannotListen, Server
from dispatcher.settings import Settings, SettingsError, unknown
from dispatcher.worker import Worker

AGAIN: Final = 0.5
"""Seconds between two tries to reach the database at the start."""

PINGS: Final = 2
"""Looks at the database's clock with each beat."""

STANDS_STILL: Final = 30.0
"""Seconds, beyond the poll interval, after which a worker that did not look at the outbox hangs;
a statement that waits for its timeout is no hang."""

PRUNE: Final = 3600.0
"""Seconds between two rounds that remove old messages."""

WATCHDOG: Final = 5.0
"""Seconds between two signs of life for the supervisor."""

WRITE_BACK: Final = 1.0
"""Seconds that the last results get at least, even when the drain time is over."""

log = structlog.stdlib.get_logger()


async def run(settings: Settings) -> int:
    """Run one worker until SIGTERM or SIGINT; returns the exit code."""
    logs.configure(settings.log_format, settings.log_level)
    for name in unknown():
        log.warning("setting.unknown", name=name)
    spool.prepare(settings.data_dir)
    code = 2
    with _database(settings) as dsn:
        try:
            code = await App(settings, dsn).run()
        except* SettingsError as errors:
            wrong: BaseException = errors
            while isinstance(wrong, BaseExceptionGroup):
                wrong = wrong.exceptions[0]
            sys.stderr.write(f"{wrong}\n")
    return code


@contextmanager
def _database(settings: Settings) -> Iterator[str]:
    """The address of the database: the one that is set, or an embedded one."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    with EmbeddedPostgres(settings.data_dir) as embedded:
        log.info("database.embedded", psql=f'psql "{embedded.dsn}"')
        yield embedded.dsn


class DatabaseWatch:
    """Tells the log when a first part has lost the database, and when all have it back."""

    def __init__(self) -> None:
        self._reached = False
        self._without: set[str] = set()
        self.troubled: Callable[[], None] = lambda: None
        """Called with each loss, and when the database is back."""
        self.was_away = False
        """Whether it was ever lost."""

    @property
    def away(self) -> bool:
        """Whether some part cannot work for want of the database."""
        return not self._reached or bool(self._without)

    def of(self, part: str) -> Callable[[str | None], None]:
        """What a part calls with each loss, as one phrase, and with None after a success."""
        return partial(self._hear, part)

    def _hear(self, part: str, loss: str | None) -> None:
        if loss is not None:
            if not self._without:
                log.error("database.lost", reason=loss)
            self.was_away = True
            self._without.add(part)
            self.troubled()
            return
        self._reached = True
        if part in self._without:
            self._without.discard(part)
            if not self._without:
                log.info("database.back")
                self.troubled()


class App:
    """One worker process."""

    def __init__(self, settings: Settings, dsn: str) -> None:
        self._settings = settings
        self._dsn = dsn
        # A statement must end, one way or the other, well before the lease does.
        self._timeout = max(0.5, min(10.0, settings.lease / 3))
        self._watch = DatabaseWatch()
        self._stop = asyncio.Event()
        self._metrics = Metrics()
        self._worker: Worker | None = None
        self._spool: Callable[[], None] = lambda: None
        self._schema_current = False

    async def run(self) -> int:
        """Run until told to stop; returns the exit code."""
        self._handle_signals()
        async with AsyncExitStack() as stack:
            try:
                server = await stack.enter_async_context(
                    Server(
                        self._settings, dsn=self._dsn, metrics=self._metrics, unready=self._unready
                    )
                )
            except CannotListen as error:
                sys.stderr.write(f"{error}\n")
                return 2
            complaint = await self._wait_for_schema()
            if complaint is not None:
                sys.stderr.write(f"{complaint}\n")
                return 1
            if self._stop.is_set():
                return 0
            return await self._work(server)

    def _handle_signals(self) -> None:
        def handle() -> None:
            if not self._stop.is_set():
                self._stop.set()
                return
            try:
                self._spool()
                sys.stdout.flush()
            finally:
                os._exit(1)

        loop = asyncio.get_running_loop()
        numbers = [signal.SIGTERM, signal.SIGINT]
        # Its terminal is closed; who started it with nohup wants it to go on.
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, handle)

    def _unready(self) -> str | None:
        if self._watch.away:
            return "the database is away"
        if not self._schema_current:
            return "the schema is not the one this program needs"
        if self._worker is None:
            return "the worker starts"
        if self._stop.is_set():
            return "the worker stops"
        if clock.now() - self._worker.looked_at > STANDS_STILL + self._settings.poll_interval:
            return "the worker's loop stands still"
        return None

    async def _wait_for_schema(self) -> str | None:
        """Wait for the database; returns what is wrong with its schema, as one sentence."""
        told = self._watch.of("start")
        while not self._stop.is_set():
            try:
                if self._settings.database_url is None:
                    await schema.upgrade(self._dsn)
                async with self._session("start") as session:
                    complaint = await schema.complaint(session)
            except schema.SchemaWrong as error:
                return str(error)
            except DatabaseLost as error:
                told(str(error))
                await _either(self._stop.wait(), AGAIN)
                continue
            told(None)
            self._schema_current = complaint is None
            return complaint
        return None

    @asynccontextmanager
    async def _session(self, name: str, *, planned_once: bool = False) -> AsyncIterator[Session]:
        async with Session(
            self._dsn, name=f"dispatcher {name}", timeout=self._timeout, planned_once=planned_once
        ) as session:
            yield session

    async def _work(self, server: Server) -> int:
        settings = self._settings
        async with AsyncExitStack() as stack:
            claims = await stack.enter_async_context(self._session("claim", planned_once=True))
            records = await stack.enter_async_context(self._session("record", planned_once=True))
            rescues = await stack.enter_async_context(self._session("rescue", planned_once=True))
            beats = await stack.enter_async_context(self._session("beat"))
            upkeep = await stack.enter_async_context(self._session("upkeep"))
            slots = await stack.enter_async_context(self._session("pace"))
            provider = await stack.enter_async_context(
                Provider(
                    settings.provider_url,
                    timeout=settings.request_timeout,
                    keepalive=settings.keepalive,
                    concurrency=settings.concurrency,
                )
            )
            lease = Lease(settings.lease)
            database_clock = DatabaseClock()
            if not await self._enter(beats, lease, database_clock):
                return 0
            breaker = Breaker(settings)
            worker = self._worker = Worker(
                settings,
                session=claims,
                pace_session=slots,
                database_clock=database_clock,
                lease=lease,
                breaker=breaker,
                provider=provider,
                metrics=self._metrics,
                database=self._watch.of("claim"),
            )
            recorder = Recorder(
                records,
                lease.worker_id,
                breaker,
                self._metrics,
                places=settings.concurrency,
                released=worker.sender.released,
                accepted=server.accepted,
                database=self._watch.of("record"),
            )
            rescuer = Rescuer(settings, rescues, self._metrics, self._watch.of("rescue"))
            self._spool = partial(self._spool_unrecorded, recorder, lease)
            self._watch.troubled = rescuer.hold_off
            if self._watch.was_away:
                rescuer.hold_off()
            self._metrics.observe(
                in_flight=lambda: worker.sender.in_flight, lag=lambda: recorder.lag
            )
            log.info(
                "worker.started",
                worker_id=lease.worker_id,
                egress=settings.egress,
                concurrency=settings.concurrency,
                version=__version__,
            )
            supervisor.tell("READY=1")
            parts: dict[str, Awaitable[None]] = {
                "beat": self._beat(beats, lease, database_clock, worker),
                "watchdog": self._watchdog(worker),
                "listen": self._listen(worker, breaker),
                "rescue": rescuer.run(),
                "prune": self._prune(upkeep),
                "heartbeat": heartbeat.beat(upkeep, settings.egress, recorder.recorded),
                "server": server.run(),
            }
            failed = True
            try:
                failed = await self._serve(worker, recorder, parts)
            except* Exception as errors:
                for error in errors.exceptions:
                    log.error("worker.failed", exc_info=error)
            finally:
                self._spool()
            try:
                async with asyncio.timeout(WRITE_BACK):
                    await worker.release_lost_claims()
                    await workers.leave(beats, lease.worker_id)
            except (DatabaseLost, TimeoutError) as error:
                # The lease runs out by itself, and others take what is left.
                self._watch.of("beat")(str(error) or "no answer in time")
            except Exception as error:
                failed = True
                log.error("worker.failed", exc_info=error)
            log.info("worker.stopped", worker_id=lease.worker_id)
            return 1 if failed else 0

    def _spool_unrecorded(self, recorder: Recorder, lease: Lease) -> None:
        left = recorder.unrecorded()
        try:
            path = spool.write(
                self._settings.data_dir,
                lease.worker_id,
                lease.entered,
                left,
                database=lease.database,
            )
        except OSError as error:
            log.error("spool.failed", results=len(left), reason=error.strerror)
            return
        if path is not None:
            log.warning("spool.written", results=len(left), file=path.name)

    async def _enter(self, session: Session, lease: Lease, database_clock: DatabaseClock) -> bool:
        """Take up what is spooled and enter the worker; False if told to stop before that."""
        told = self._watch.of("start")
        while not self._stop.is_set():
            try:
                await spool.take_up(self._settings.data_dir, session)
                asked_at = clock.now()
                lease.worker_id = await workers.enter(
                    session,
                    self._settings.egress,
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    version=__version__,
                    lease=self._settings.lease,
                )
                lease.renewed(asked_at)
                lease.entered = await workers.entered(session, lease.worker_id) or ""
                lease.database = await workers.database(session)
                await database_clock.ping(session, 3 * PINGS)
            except DatabaseLost as error:
                told(str(error))
                await _either(self._stop.wait(), AGAIN)
                continue
            told(None)
            return True
        return False

    async def _serve(
        self, worker: Worker, recorder: Recorder, parts: dict[str, Awaitable[None]]
    ) -> bool:
        """Run all parts until told to stop, then drain; tells whether a part failed."""
        failed = False
        # Messages in flight outlive the parts: a request that has left is never cancelled.
        async with asyncio.TaskGroup() as sends:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(_forever(part)) for part in parts.values()]
                    working = group.create_task(worker.run(sends, recorder))
                    recording = group.create_task(recorder.run())
                    await self._stop.wait()
                    ends = clock.now() + self._settings.drain
                    log.info("worker.stopping", in_flight=worker.sender.in_flight)
                    supervisor.tell("STOPPING=1")
                    worker.stop()
                    # A claim may wait for a database that is away; its rows are found again.
                    await asyncio.wait([working], timeout=self._settings.drain)
                    working.cancel()
                    await self._drain(worker, recorder, recording, ends)
                    for task in (*tasks, recording):
                        task.cancel()
            except* Exception as errors:
                failed = True
                for error in errors.exceptions:
                    log.error("worker.failed", exc_info=error)
            if failed:
                self._stop.set()
                worker.stop()
                recording = sends.create_task(_as_far_as_it_goes(recorder))
                ends = clock.now() + self._settings.drain
                await self._drain(worker, recorder, recording, ends)
                recording.cancel()
            for message in list(worker.sender.tasks):
                message.cancel()
        return failed

    async def _drain(
        self, worker: Worker, recorder: Recorder, recording: asyncio.Task[None], ends: float
    ) -> None:
        """Wait until `ends` for what is in flight, and for its results to be written."""
        while worker.sender.tasks and (left := ends - clock.now()) > 0:
            await asyncio.wait(worker.sender.tasks, timeout=left)
        for settled in worker.sender.abandon():
            recorder.put(settled)
        recorder.close()
        await asyncio.wait([recording], timeout=max(WRITE_BACK, ends - clock.now()))

    async def _beat(
        self, session: Session, lease: Lease, database_clock: DatabaseClock, worker: Worker
    ) -> None:
        told = self._watch.of("beat")
        while True:
            asked_at = clock.now()
            try:
                unbroken = await workers.beat(session, lease.worker_id)
                if unbroken is None:
                    raise RuntimeError("this worker was deleted from the table 'worker'")
                lease.renewed(asked_at, unbroken=unbroken)
                await database_clock.ping(session, PINGS)
                told(None)
                worker.reconcile(rescued=not unbroken)
            except DatabaseLost as error:
                told(str(error))
                await asyncio.sleep(min(AGAIN, lease.seconds / 10))
                continue
            await asyncio.sleep(lease.seconds / 4)

    async def _prune(self, session: Session) -> None:
        """Remove what has been finished for long, once an hour, if that is wanted."""
        days = self._settings.prune_days
        while True:
            if days is not None:
                messages = 0
                try:
                    async for pruned in prune(session, timedelta(days=days)):
                        messages = pruned.messages
                except DatabaseLost as error:
                    # Nothing waits for it; what is left is removed in the next round.
                    log.warning("prune.failed", reason=str(error))
                if messages:
                    log.info("outbox.pruned", messages=messages)
            await asyncio.sleep(PRUNE)

    async def _watchdog(self, worker: Worker) -> None:
        """Tell the supervisor that the loop goes round, for as long as it does."""
        while True:
            if clock.now() - worker.looked_at <= STANDS_STILL + self._settings.poll_interval:
                supervisor.tell("WATCHDOG=1")
            await asyncio.sleep(WATCHDOG)

    async def _listen(self, worker: Worker, breaker: Breaker) -> None:
        told = self._watch.of("listen")

        def heard(payload: str) -> None:
            told(None)
            kind, _, name = payload.partition(":")
            if kind == "closed" and name == self._settings.egress:
                breaker.shut()
            if kind == "cancel":
                worker.sender.recall()
            worker.wake(egress_changed=kind != "outbox")

        while True:
            try:
                await listen(self._dsn, heard, timeout=self._timeout)
            except DatabaseLost as error:
                told(str(error))
            await asyncio.sleep(AGAIN)


async def _as_far_as_it_goes(recorder: Recorder) -> None:
    """Record after a failure; what it cannot take stays in the recorder, for the spool."""
    try:
        await recorder.run()
    except Exception as error:
        log.error("worker.failed", exc_info=error)


async def _forever(part: Awaitable[None]) -> None:
    """A part that ends by itself has failed."""
    await part
    raise RuntimeError("a part of the worker ended by itself")


async def _either(event: Awaitable[object], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event
    except TimeoutError:
        return
