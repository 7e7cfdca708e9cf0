"""The command `dispatcher export`."""

import csv
import sys
from collections.abc import Iterable, Iterator
from contextlib import aclosing, contextmanager
from datetime import datetime
from json import dumps
from pathlib import Path
from typing import Annotated, TextIO

import typer

from dispatcher.commands.database import use
from dispatcher.commands.failures import Failed
from dispatcher.commands.terminal import many, utc
from dispatcher.db.export import COLUMNS, batch
from dispatcher.db.pool import Session
from dispatcher.settings import load

PATIENCE = 3600.0
"""Seconds that a whole export may take."""


def export(
    *,
    label: Annotated[str, typer.Option("--batch", metavar="LABEL", help="The batch.")],
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write there, not to standard output."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON, not CSV.")] = False,
) -> None:
    """Write a batch as CSV: each message with what became of it.

    The numbers are whole, as they were enqueued; the texts are not in it.

    For example:

    \b
    dispatcher export --batch may --output may.csv
    """  # noqa: D301 - the character \b itself keeps the example's lines apart

    async def work(session: Session) -> int:
        count = 0
        async with aclosing(batch(session, label)) as rows:
            first = await anext(rows, None)
            if first is None:
                raise Failed(f"There is no message in the batch {label!r}.")
            with _opened(output) as stream:
                write = _JsonArray(stream) if json else _Csv(stream)
                write.row(first)
                count = 1
                async for row in rows:
                    write.row(row)
                    count += 1
                write.end()
        return count

    count = use(load(), work, patience=PATIENCE)
    if output is not None:
        typer.echo(f"{many(count, 'message')} written to {output}.", err=True)


class _Csv:
    def __init__(self, stream: TextIO) -> None:
        self._writer = csv.writer(stream, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def row(self, row: Iterable[object]) -> None:
        self._writer.writerow(map(_plain, row))

    def end(self) -> None:
        """A CSV file has no end of its own."""


class _JsonArray:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._before = "[\n"

    def row(self, row: Iterable[object]) -> None:
        record = dict(zip(COLUMNS, map(_plain, row), strict=True))
        self._stream.write(self._before + dumps(record, ensure_ascii=False))
        self._before = ",\n"

    def end(self) -> None:
        self._stream.write("\n]\n")


def _plain(value: object) -> object:
    return utc(value) if isinstance(value, datetime) else value


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        with path.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise Failed(f"{path} cannot be written ({error.strerror}).") from None
