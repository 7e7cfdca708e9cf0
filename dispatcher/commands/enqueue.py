"""The command `dispatcher enqueue`."""

import os
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from rich.progress import Progress

from dispatcher.commands.csv_file import (
    SHOWN,
    TEXT_LIMIT,
    CsvFile,
    Findings,
    Template,
    Wrong,
    complaint,
    stored,
)
from dispatcher.commands.database import use
from dispatcher.commands.failures import Failed, Misused
from dispatcher.commands.moments import moment
from dispatcher.commands.terminal import bars, many, print_json, printable, wrapped
from dispatcher.db.enqueue import Enqueued, NewMessage, Staging, Written, fits, now, staging
from dispatcher.db.enqueue import enqueue as put
from dispatcher.db.pool import Session
from dispatcher.settings import Settings, load

PATIENCE = 600.0
"""Seconds that one step of a whole file may take."""

CHUNK = 5000
"""Lines that are taken in one step."""

PREVIEWED = 3


def enqueue(  # noqa: PLR0913 - each option of the command is an argument
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE.csv]",
            help="Messages, one a line, with columns named as in the table outbox.",
        ),
    ] = None,
    *,
    service: Annotated[
        int, typer.Option(metavar="ID", min=0, max=2**63 - 1, help="The service to send through.")
    ],
    msisdn: Annotated[str | None, typer.Option(metavar="NUMBER", help="To whom.")] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="What; with a file, a template of its columns."),
    ] = None,
    priority: Annotated[
        int, typer.Option(metavar="N", min=-(2**15), max=2**15 - 1, help="Higher goes first.")
    ] = 0,
    send_after: Annotated[
        str | None, typer.Option(metavar="TIME", help="Not before; a time, or a span such as 2h.")
    ] = None,
    expires_at: Annotated[str | None, typer.Option(metavar="TIME", help="Not after.")] = None,
    dedup_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="Refuse a second message with this key.")
    ] = None,
    batch: Annotated[str | None, typer.Option(metavar="LABEL", help="A label of your own.")] = None,
    extended: Annotated[bool, typer.Option(help="Ask for delivery reports.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put one message into the outbox, or a whole CSV file of them.

    A file is checked whole before its first message is written: all or nothing.

    For example:

    \b
    dispatcher enqueue --service 42 --msisdn 0881234567 --text 'Ready!'
    dispatcher enqueue people.csv --service 42 --batch may \\
        --text 'Invoice $number: $amount due'
    """  # noqa: D301 - the character \b itself keeps the example's lines apart
    settings = load()
    given = _Given(text, priority, send_after, expires_at, batch, extended)
    if file is not None:
        if msisdn is not None or dedup_key is not None:
            raise Misused(
                "A file brings its own numbers and keys: leave out --msisdn, --dedup-key."
            )
        _enqueue_file(file, service, given, settings, as_json=json)
        return
    if msisdn is None or text is None:
        raise Misused("Give --msisdn and --text, or a file.")
    unfit = stored([msisdn, text, dedup_key or "", batch or ""])
    if unfit is not None:
        raise Misused(f"Nothing is enqueued: {unfit}.")

    async def work(session: Session) -> Enqueued:
        time = await now(session)
        message = replace(given.message(time), msisdn=msisdn, dedup_key=dedup_key)
        wrong = complaint(message, settings.region, time)
        if wrong is None and await fits(session, service, text) is False:
            wrong = "the text matches none of the service's patterns"
        if wrong is not None:
            raise Failed(f"Nothing is enqueued: {wrong}.")
        return await put(session, service, message)

    done = use(settings, work)
    if done.id is None:
        raise Failed(_no_service(service))
    if json:
        print_json({"id": done.id, "enqueued": done.new})
    elif done.new:
        typer.echo(done.id)
    if not done.new:
        raise Failed(f"Message {done.id} has the dedup_key {dedup_key!r}; nothing is enqueued.")


def _time(option: str, written: str | None, now: datetime) -> datetime | None:
    if written is None:
        return None
    try:
        return moment(written, now)
    except ValueError as error:
        raise Misused(f"{option} is wrong: {error}.") from None


@dataclass(frozen=True, slots=True)
class _Given:
    """What the options say of every message."""

    text: str | None
    priority: int
    send_after: str | None
    expires_at: str | None
    batch: str | None
    extended: bool

    def message(self, now: datetime) -> NewMessage:
        """A message of it, still without a number. Raises Misused."""
        return NewMessage(
            msisdn="",
            text=self.text or "",
            extended=self.extended,
            priority=self.priority,
            send_after=_time("--send-after", self.send_after, now),
            expires_at=_time("--expires-at", self.expires_at, now),
            batch=self.batch,
        )


def _enqueue_file(
    path: Path, service: int, given: _Given, settings: Settings, *, as_json: bool
) -> None:
    if given.text is not None and not Template(given.text).is_valid():
        raise Misused("--text is wrong: a name must follow each '$'; write '$$' for a dollar sign.")
    try:
        file = path.open("rb")
    except OSError as error:
        raise Failed(f"{path} cannot be read ({error.strerror}).") from None
    with file:
        way = _FileToOutbox(path, file, service, as_json=as_json)
        use(settings, lambda session: way.run(session, given, settings.region), patience=PATIENCE)


class _FileToOutbox:
    """One file's way: read and check every line, show, and only then write."""

    def __init__(self, path: Path, file: BinaryIO, service: int, *, as_json: bool) -> None:
        self._path = path
        self._file = file
        self._service = service
        self._as_json = as_json
        self._findings = Findings()
        self._preview: list[tuple[int, NewMessage]] = []
        self._messages = 0
        self._last_line = 0

    async def run(self, session: Session, given: _Given, region: str) -> None:
        time = await now(session)
        async with staging(session, self._service) as stage:
            if stage is None:
                raise Failed(_no_service(self._service))
            try:
                lines = CsvFile(
                    self._file,
                    service_id=self._service,
                    template=given.text,
                    defaults=given.message(time),
                    region=region,
                    now=time,
                )
            except ValueError as error:
                raise Failed(f"{self._path} cannot be used: {error}.") from None
            with bars() as progress:
                await self._check(stage, lines, progress)
                if self._findings.count:
                    progress.stop()
                    raise self._refused(lines)
                if not self._messages:
                    raise Failed(f"{self._path} has no messages.")
                if not self._as_json:
                    self._show(lines)
                written = await self._write(stage, progress)
        if self._as_json:
            print_json(
                {
                    "enqueued": written.count,
                    "first_id": written.first,
                    "last_id": written.last,
                    "longest_text": lines.longest,
                    "ignored_columns": lines.ignored,
                }
            )
        else:
            ids = (
                f"ids {written.first} to {written.last}"
                if written.count > 1
                else f"with id {written.first}"
            )
            typer.echo(f"{many(written.count, 'message')} enqueued, {ids}.")

    async def _check(self, stage: Staging, lines: CsvFile, progress: Progress) -> None:
        size = os.fstat(self._file.fileno()).st_size or None
        bar = progress.add_task("checking", total=size)
        chunk: list[tuple[int, NewMessage]] = []
        for found in lines:
            if isinstance(found, Wrong):
                self._findings.add([found])
                continue
            chunk.append(found)
            if len(chunk) == CHUNK:
                await self._take(stage, chunk)
                chunk = []
                progress.update(bar, completed=lines.bytes_read)
        await self._take(stage, chunk)
        progress.update(bar, completed=size)
        for objection in await stage.objections(SHOWN):
            self._findings.add((Wrong(*line) for line in objection.lines), objection.count)

    async def _take(self, stage: Staging, chunk: list[tuple[int, NewMessage]]) -> None:
        if not chunk:
            return
        await stage.add(chunk)
        self._preview = self._preview or chunk[:PREVIEWED]
        self._messages += len(chunk)
        self._last_line = chunk[-1][0]

    async def _write(self, stage: Staging, progress: Progress) -> Written:
        bar = progress.add_task("writing", total=self._last_line)
        parts = []
        for start in range(1, self._last_line + 1, CHUNK):
            parts.append(await stage.write(start, start + CHUNK - 1))
            progress.update(bar, completed=min(start + CHUNK - 1, self._last_line))
        return Written(
            sum(part.count for part in parts),
            min(part.first for part in parts if part.first is not None),
            max(part.last for part in parts if part.last is not None),
        )

    def _refused(self, lines: CsvFile) -> Failed:
        findings = self._findings
        if self._as_json:
            print_json(
                {
                    "enqueued": 0,
                    "wrong_lines": findings.count,
                    "lines": [asdict(wrong) for wrong in findings.first],
                    "longest_text": lines.longest,
                    "texts_too_long": lines.over,
                }
            )
        else:
            for wrong in findings.first:
                typer.echo(f"line {wrong.line}: {wrong.reason}", err=True)
            if findings.count > len(findings.first):
                typer.echo(f"… and {findings.count - len(findings.first)} more", err=True)
            if lines.over:
                told = f"{many(lines.over, 'text')} too long, the longest by "
                told += many(lines.longest - TEXT_LIMIT, "character")
                typer.echo(told, err=True)
        are = "1 line is" if findings.count == 1 else f"{findings.count} lines are"
        return Failed(f"Nothing is enqueued: {are} wrong in {self._path}.")

    def _show(self, lines: CsvFile) -> None:
        for line, message in self._preview:
            typer.echo(
                wrapped(
                    f"line {line}, to {printable(message.msisdn)}, "
                    f"{many(len(message.text), 'character')}: {printable(message.text)}"
                )
            )
        if self._messages > len(self._preview):
            typer.echo(f"… and {self._messages - len(self._preview)} more")
        typer.echo(f"The longest text has {many(lines.longest, 'character')} of {TEXT_LIMIT}.")
        if lines.ignored:
            typer.echo(wrapped(f"Columns not used: {', '.join(map(printable, lines.ignored))}."))


def _no_service(service: int) -> str:
    return f"There is no service {service}; add it with 'dispatcher service add'."
