"""The command `dispatcher demo`: everything at once, on real parts, in half a minute."""

from __future__ import annotations

import asyncio
import json as json_format
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from secrets import token_urlsafe
from types import TracebackType
from typing import Annotated, Any, Final, Self, cast
from urllib.parse import urlsplit

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dispatcher.db import demo as outbox
from dispatcher.db.pool import DatabaseLost, Record, Session
from dispatcher.db.schema import upgrade
from dispatcher.domain.message import Status
from dispatcher.embedded import EmbeddedPostgres
from dispatcher.settings import load

Event = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Service:
    id: int
    name: str
    messages: int
    day_limit: int | None
    min_delay: float
    """Seconds."""


SERVICES: Final = (
    _Service(42, "invoices", messages=1700, day_limit=1000, min_delay=0),
    _Service(43, "reminders", messages=300, day_limit=None, min_delay=0.02),
)
TOTAL: Final = sum(service.messages for service in SERVICES)
USER: Final = 7

WORKERS: Final = 2
CONCURRENCY: Final = 20
"""Of each worker; few, so that it lasts long enough to be watched."""

LATENCY: Final = "0.05:0.15"
BAN_AFTER: Final = 700
BAN_SECONDS: Final = 2.5
BAN_BACKOFF: Final = 1
"""The simulator bans for BAN_SECONDS, so that the first probe comes too early, and not the next."""

REPORTS: Final = "enroute=0.1:0.5,final=0.5:1.5,undelivered=0.02"

LOOK: Final = 0.1
LINE: Final = 2.0
"""Seconds between two looks at the database, and between two lines where there is no terminal."""

START_MOST: Final = 60.0
LONGEST: Final = 120.0
REPORTS_MOST: Final = 10.0
END_MOST: Final = 10.0
"""Seconds that each part may take at most before the demo gives up."""

WIDTH: Final = 80

SENT: Final = frozenset({"accepted", "enroute", "delivered", "undeliverable"})


def demo(
    *,
    json: Annotated[
        bool, typer.Option("--json", help="Print the end result as JSON; progress on stderr.")
    ] = False,
) -> None:
    """Watch 2,000 messages go through two workers to a simulated provider.

    Two services have limits that bite, and the provider bans us in the middle.
    It needs nothing: it starts a PostgreSQL of its own, in the folder "demo" of
    DISPATCHER_DATA_DIR, and touches no other. No SMS is sent.

    The exit code is 1 if a message was sent twice or got lost.

    For example:

    \b
    dispatcher demo
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    folder = (load(database_url=None).data_dir / "demo").absolute()
    console = Console(stderr=json, highlight=False, markup=False)
    console.width = min(console.width, WIDTH)
    console.print("Setting up a PostgreSQL, a simulated provider and two workers; no SMS is sent.")
    try:
        with EmbeddedPostgres(folder) as server:
            end = asyncio.run(_uninterrupted(server.dsn, folder, console))
    except Failed as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from None
    if end is None:
        typer.echo("Stopped before its end, and cleaned up.", err=True)
        raise typer.Exit(1)
    if json:
        typer.echo(json_format.dumps(end.document(), indent=2))
    else:
        console.print(end.shown(), _next(end, folder))
    raise typer.Exit(0 if end.good else 1)


class Failed(Exception):
    """The demo cannot go on; the text is one sentence for people."""


async def _uninterrupted(dsn: str, folder: Path, console: Console) -> End | None:
    """Play; None if a signal asked to stop, and then all that was started has been ended."""
    playing = asyncio.create_task(_play(dsn, folder, console))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not playing.cancelling():  # a second signal must not interrupt the cleaning up
            playing.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop)
    await asyncio.wait({playing})
    return None if playing.cancelled() else playing.result()


async def _play(dsn: str, folder: Path, console: Console) -> End:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(Session(dsn, name="dispatcher demo", timeout=30))
        if not await outbox.begin(session):
            raise Failed(f"A demo runs in {folder} already; wait for its end.")
        shutil.rmtree(folder / "spool", ignore_errors=True)  # what an earlier demo left
        await upgrade(dsn)
        for service in SERVICES:
            await outbox.add_service(
                session,
                service.id,
                user_id=USER,
                name=service.name,
                day_limit=service.day_limit,
                min_delay=timedelta(seconds=service.min_delay),
            )
        progress = stack.enter_context(_Progress(console))
        url, workers, simulator = await _start(stack, dsn, folder, progress)
        stack.push_async_callback(_leave_safe, session)

        progress.begin()
        for service in SERVICES:
            await outbox.add_messages(session, service.id, service.name, service.messages)
        finished = await _watch(session, [*workers, simulator], progress)
        seconds = progress.seconds
        for worker in workers:
            await worker.end()
        received = await _ask(url, "/simulator/received")
        log = await _ask(url, "/simulator/messages")
        return End(
            seconds=seconds,
            finished=finished,
            clean=all(worker.code == 0 for worker in workers),
            messages=await outbox.messages(session),
            days=await outbox.days(session),
            ban=progress.ban,
            received=json_format.loads(received),
            log=[json_format.loads(line) for line in log.splitlines()],
        )


async def _start(
    stack: AsyncExitStack, dsn: str, folder: Path, progress: _Progress
) -> tuple[str, list[_Process], _Process]:
    """Start the workers and the simulator, and have reports sent to the first worker.

    Returns the simulator's address too.
    """
    services = [
        f"--service={s.id}:user={USER},delay={s.min_delay}"
        + ("" if s.day_limit is None else f",day={s.day_limit}")
        for s in SERVICES
    ]
    simulator = await stack.enter_async_context(
        _process(
            *("simulator", "--json", *services, "--latency", LATENCY, "--dlr", REPORTS),
            *("--ban-after", str(BAN_AFTER), "--ban-for", str(BAN_SECONDS)),
            folder=folder,
            heard=progress.heard,
        )
    )
    url = str((await simulator.told("listening"))["url"])
    token = token_urlsafe()
    settings = {
        "DATABASE_URL": dsn,
        "DISPATCHER_DATA_DIR": str(folder),
        "DISPATCHER_PROVIDER_URL": f"{url}/users/send_bulk.php",
        "DISPATCHER_CONCURRENCY": str(CONCURRENCY),
        "DISPATCHER_BAN_BACKOFF": str(BAN_BACKOFF),
        "DISPATCHER_HTTP_PORT": "0",
        "DISPATCHER_DLR_TOKEN": token,
        "DISPATCHER_LOG_FORMAT": "json",
    }
    workers = [
        await stack.enter_async_context(
            _process("run", folder=folder, heard=progress.heard, **settings)
        )
        for _ in range(WORKERS)
    ]
    for worker in workers:
        await worker.told("worker.started")
    port = (await workers[0].told("http.listening"))["port"]
    reports = {"reports": {"url": f"http://127.0.0.1:{port}/dlr/{token}"}}
    await _ask(url, "/simulator/set", reports)
    return url, workers, simulator


async def _watch(session: Session, processes: list[_Process], progress: _Progress) -> bool:
    """Watch until all that may go is gone and reported; False if that takes too long."""
    ends = time.monotonic() + LONGEST
    reports_end: float | None = None
    while (now := time.monotonic()) < ends:
        for process in processes:
            process.check()
        counts = await outbox.counts(session)
        progress.show(counts)
        if reports_end is None and await outbox.moving(session) == 0:
            reports_end = now + REPORTS_MOST
        if reports_end is not None:
            unreported = sum(c.get("accepted", 0) + c.get("enroute", 0) for c in counts.values())
            if not unreported or now >= reports_end:
                return True
        await asyncio.sleep(LOOK)
    return False


async def _leave_safe(session: Session) -> None:
    """Pause what is left, so that no worker on this database can ever send it in earnest."""
    with suppress(DatabaseLost):
        await outbox.pause(session)


class _Process:
    """A process of ours that prints JSON lines."""

    def __init__(
        self, command: str, process: asyncio.subprocess.Process, heard: Callable[[Event], object]
    ) -> None:
        self._command = command
        self._process = process
        self._heard = heard
        self._first: dict[str, Event] = {}
        self._others: deque[str] = deque(maxlen=5)
        self._more = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.returncode

    async def _read(self) -> None:
        try:
            async for line in cast(asyncio.StreamReader, self._process.stdout):
                try:
                    event = json_format.loads(line)
                except ValueError:
                    self._others.append(line.decode(errors="replace").strip())
                    continue
                self._first.setdefault(event["event"], event)
                self._more.set()
                self._heard(event)
        finally:
            self._more.set()

    async def told(self, event: str) -> Event:
        """The first event of this name, when it comes. Raises Failed."""
        try:
            async with asyncio.timeout(START_MOST):
                while event not in self._first:
                    self.check()
                    self._more.clear()
                    await self._more.wait()
        except TimeoutError:
            raise Failed(
                f"'dispatcher {self._command}' did not start in {START_MOST:.0f} seconds."
            ) from None
        return self._first[event]

    def check(self) -> None:
        """Raises Failed if it has ended."""
        if self._reading.done():
            said = f": {self._others[-1]}" if self._others else "."
            raise Failed(f"'dispatcher {self._command}' ended by itself{said}")

    async def end(self) -> None:
        """Ask it to end, and see to it that it does."""
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(END_MOST):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading


async def _ask(url: str, path: str, body: object = None) -> str:
    """What the simulator says at one of its own addresses; a body is posted as JSON."""

    def ask() -> str:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, json_format.dumps(body))
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    return await asyncio.to_thread(ask)


@asynccontextmanager
async def _process(
    command: str,
    *options: str,
    folder: Path,
    heard: Callable[[Event], object],
    **settings: str,
) -> AsyncIterator[_Process]:
    """Run `dispatcher` with these settings and no others; it is ended on leaving."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name != "DATABASE_URL" and not name.startswith("DISPATCHER_")
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dispatcher", command, *options),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,  # where no file .env says otherwise
        env={**inherited, "PYTHONPATH": str(Path(__file__).parents[1]), **settings},
        start_new_session=True,  # Ctrl-C is for us, and we pass it on in order
    )
    running = _Process(command, process, heard)
    try:
        yield running
    finally:
        await running.end()


@dataclass(slots=True)
class _Ban:
    """A ban, as the workers told it."""

    began: datetime | None = None
    ended: datetime | None = None
    probes: int = 0


class _Progress:
    """Shows how it goes: bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.ban = _Ban()
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._began: float | None = None
        self._next_line = 0.0
        self._used_up: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    @property
    def seconds(self) -> float:
        """Since the messages were inserted."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def begin(self) -> None:
        """Say that the messages are inserted now."""
        self._began = time.monotonic()
        self._next_line = LINE
        if self._console.is_terminal:
            self._live.start()
        self._tell(f"{TOTAL:,} messages are inserted; {WORKERS} workers begin to send.")

    def heard(self, event: Event) -> None:
        """Take an event from a worker's log."""
        match event["event"]:
            case "egress.banned" if self.ban.began is None:
                self.ban.began = _time(event)
                self._tell("The provider bans our IP address: both workers stop at once.")
            case "egress.banned":
                self._tell("The ban is not over: the next probe waits twice as long.")
            case "egress.probing":
                self.ban.probes += 1
                self._tell("One message goes as a probe, for both workers.")
            case "egress.resumed":
                self.ban.ended = _time(event)
                self._tell("The probe was accepted: both workers go on.")
            case "quota.exhausted" if event["service_id"] not in self._used_up:
                self._used_up.add(event["service_id"])
                name = next(s.name for s in SERVICES if s.id == event["service_id"])
                self._tell(f"The limit of {name} for this {event['period']} is used up.")

    def _tell(self, sentence: str) -> None:
        self._console.print(f"{self.seconds:5.1f} s  {sentence}")

    def show(self, counts: Mapping[int, Mapping[str, int]]) -> None:
        """Show the counts of messages, by service and status."""
        if self._console.is_terminal:
            self._live.update(self._bars(counts), refresh=True)
        elif self.seconds >= self._next_line:
            self._next_line = self.seconds + LINE
            parts = [f"{_sent(counts, s):,} of {s.messages:,} {s.name}" for s in SERVICES]
            self._tell(f"{' and '.join(parts)} are sent.")

    def _bars(self, counts: Mapping[int, Mapping[str, int]]) -> RenderableType:
        bars = Table.grid(padding=(0, 2))
        for service in SERVICES:
            sent = _sent(counts, service)
            delivered = counts.get(service.id, {}).get("delivered", 0)
            bars.add_row(
                f"{self.seconds:5.1f} s",
                service.name,
                ProgressBar(total=service.messages, completed=sent, width=22),
                f"{sent:>5,} sent",
                f"{delivered:>5,} delivered",
            )
        return bars


def _sent(counts: Mapping[int, Mapping[str, int]], service: _Service) -> int:
    return sum(n for status, n in counts.get(service.id, {}).items() if status in SENT)


def _time(event: Event) -> datetime:
    return datetime.fromisoformat(event["timestamp"])


@dataclass(frozen=True, slots=True)
class End:
    """What became of it all; what the provider received is told by the simulator alone."""

    seconds: float
    finished: bool
    """Whether all that might go went, in time."""
    clean: bool
    """Whether the workers ended well."""
    messages: list[Record]
    days: dict[int, outbox.Window]
    ban: _Ban
    received: dict[str, Any]
    log: list[dict[str, Any]]

    @property
    def good(self) -> bool:
        """Whether the demo shows what it should."""
        return self.finished and self.clean and not (self.twice or self.lost)

    @property
    def twice(self) -> int:
        """Messages that reached the simulator twice, by its own count."""
        return int(self.received["received_twice"])

    @property
    def lost(self) -> int:
        """Messages of which outbox and simulator tell different stories, or the outbox none.

        What is recorded as sent must have been accepted there, and what was accepted must be
        recorded so; all else must still wait.
        """
        accepted = {
            (entry["service_id"], entry["msisdn"], entry["text"])
            for entry in self.log
            if (entry["answer"] or "").startswith("MSG_OK")
        }
        astray = TOTAL - len(self.messages)
        for row in self.messages:
            there = (str(row["service_id"]), row["msisdn"], row["text"]) in accepted
            astray += row["status"] not in (SENT if there else {Status.PENDING})
        return astray

    def statuses(self, service: _Service) -> Counter[str]:
        """How many of a service's messages have which status."""
        return Counter(row["status"] for row in self.messages if row["service_id"] == service.id)

    def document(self) -> dict[str, object]:
        """The result as JSON shows it: times in ISO 8601 UTC, durations in seconds."""
        return {
            "seconds": round(self.seconds, 1),
            "finished": self.finished,
            "messages": len(self.messages),
            "services": [
                {
                    "service_id": s.id,
                    "name": s.name,
                    "messages": sum(self.statuses(s).values()),
                    "statuses": dict(self.statuses(s)),
                }
                for s in SERVICES
            ],
            "held_back": [*self._held_by_days(), *self._held_by_delays(), *self._held_by_ban()],
            "requests": self.received["requests"],
            "accepted": self.received["accepted"],
            "received_twice": self.twice,
            "lost": self.lost,
        }

    def _held_by_days(self) -> list[dict[str, Any]]:
        return [
            {
                "limit": "day",
                "service_id": s.id,
                "allowed": s.day_limit,
                "used": self.days[s.id].used,
                "waiting": self.statuses(s)["pending"],
                "until": self.days[s.id].next.astimezone(UTC).isoformat(),
            }
            for s in SERVICES
            if s.id in self.days
        ]

    def _held_by_delays(self) -> list[dict[str, Any]]:
        held = []
        for service in SERVICES:
            told = self.received["services"].get(str(service.id))
            if service.min_delay and told:
                held.append(
                    {
                        "limit": "min_delay",
                        "service_id": service.id,
                        "seconds": service.min_delay,
                        "accepted": told["accepted"],
                        "took": told["accepted_span"],
                        "closest": told["min_spacing_accepted"],
                        "refused": told["refused_for_delay"],
                    }
                )
        return held

    def _held_by_ban(self) -> list[dict[str, Any]]:
        if self.ban.began is None or self.ban.ended is None:
            return []
        return [
            {
                "limit": "ban",
                "seconds": (self.ban.ended - self.ban.began).total_seconds(),
                "probes": self.ban.probes,
                "refused": self.received["answers"].get("BAN_IP_TEMP", 0),
            }
        ]

    def shown(self) -> RenderableType:
        """The result for people, within 80 columns."""
        parts: list[RenderableType] = [
            Text(f"\nWhat became of {TOTAL:,} messages in {self.seconds:.1f} seconds:\n"),
            self._became(),
            Text("\nWhat held them back:\n"),
            self._held(),
            Text(f"\nThe simulator counted {self.received['accepted']:,} accepted messages."),
            Text(f"Received twice: {self.twice}. Lost: {self.lost}.", style="bold"),
        ]
        if not self.finished:
            parts.append(Text(f"It was not over after {LONGEST:.0f} seconds.", style="red"))
        if not self.clean:
            parts.append(Text("A worker ended with an error.", style="red"))
        return Group(*parts)

    def _became(self) -> Table:
        found = {service: self.statuses(service) for service in SERVICES}
        shown = [status for status in Status if any(f[status] for f in found.values())]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=True, show_edge=False)
        table.add_column("service")
        for column in ("messages", *shown):
            table.add_column(column, justify="right")
        for service, counts in found.items():
            numbers = [sum(counts.values()), *(counts[status] for status in shown)]
            table.add_row(service.name, *(f"{number:,}" for number in numbers))
        return table

    def _held(self) -> Table:
        names = {service.id: service.name for service in SERVICES}
        table = Table.grid(padding=(0, 2, 0, 1))
        for day in self._held_by_days():
            window = self.days[day["service_id"]]
            table.add_row(
                f"{day['allowed']:,} a day",
                f"{day['waiting']:,} {names[day['service_id']]} wait for {window.next_there} "
                f"({_until(window.next)})",
            )
        for delay in self._held_by_delays():
            table.add_row(
                f"{delay['seconds'] * 1000:.0f} ms between two",
                f"{delay['accepted']:,} {names[delay['service_id']]} took {delay['took'] or 0:.1f}"
                f" s, the ban included, none closer than {(delay['closest'] or 0) * 1000:.1f} ms; "
                f"{delay['refused']} more were refused as too soon, and went again",
            )
        for ban in self._held_by_ban():
            table.add_row(
                "a ban",
                f"stopped both for {ban['seconds']:.1f} s; it refused {ban['refused']} requests, "
                f"and probe {ban['probes']} ended it",
            )
        return table


def _until(moment: datetime) -> str:
    minutes = max(0, round((moment - datetime.now(UTC)).total_seconds() / 60))
    return f"in {minutes // 60} h {minutes % 60} min"


def _next(end: End, folder: Path) -> RenderableType:
    """Three commands that show more of what the demo left."""
    program = _program()
    waiting = next((r["id"] for r in end.messages if r["status"] == "pending"), TOTAL)
    unset = "unset DATABASE_URL; " if os.environ.get("DATABASE_URL") else ""
    return Text(
        "\nIts database is kept, its services are paused. Look at it, for example:\n\n"
        f"  {unset}export DISPATCHER_DATA_DIR={_short(folder)}\n"
        f"  {program} status\n"
        f"  {program} why {waiting}\n"
        f"  {program} export --batch demo\n",
        no_wrap=True,
        overflow="ignore",
    )


def _program() -> str:
    """How the user called us, for a command to copy."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return "python -m dispatcher"
    found = shutil.which(called.name)
    if found is not None and Path(found).resolve() == called.resolve():
        return called.name
    return _short(called)


def _short(path: Path) -> str:
    """A path as seen from here, where it is below."""
    here = Path.cwd()
    path = path.absolute()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
