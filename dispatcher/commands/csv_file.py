"""Messages in a CSV file: reading them, and saying line by line what is wrong."""

import csv
import io
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from typing import BinaryIO, Final

from dispatcher.commands.failures import Failed
from dispatcher.commands.moments import moment
from dispatcher.db.enqueue import NewMessage
from dispatcher.domain.msisdn import normalise

TEXT_LIMIT: Final = 160
"""Characters (Unicode code points) of a text. Source: the provider's protocol."""

KEY_LIMIT: Final = 500
"""Characters of a key or a label: more than people need, less than an index can hold."""

SHOWN: Final = 20
"""Wrong lines that are named; the rest are counted."""

COLUMNS: Final = frozenset(
    {
        "service_id",
        "msisdn",
        "text",
        "extended",
        "priority",
        "send_after",
        "expires_at",
        "dedup_key",
        "batch",
    }
)

_BOOLEANS: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}


class Template(string.Template):
    """A text with `$column`, or `${any column}`; `$$` is a dollar sign."""

    braceidpattern = r"[^{}]+"


@dataclass(frozen=True, slots=True)
class Wrong:
    """A line that cannot be a message, and why, as a plain phrase."""

    line: int
    reason: str


@dataclass(slots=True)
class Findings:
    """What was found wrong: the first lines by name, all by number."""

    count: int = 0
    first: list[Wrong] = field(default_factory=list)

    def add(self, found: Iterable[Wrong], count: int | None = None) -> None:
        """Take wrong lines; `count` tells how many they are if not all are given."""
        new = list(found)
        self.count += len(new) if count is None else count
        self.first = sorted([*self.first, *new], key=lambda wrong: wrong.line)[:SHOWN]


def complaint(message: NewMessage, region: str, now: datetime) -> str | None:
    """Why a message could never be sent, as a plain phrase; None if it can."""
    if normalise(message.msisdn, region) is None:
        return "the number is not one that can be dialled"
    if not message.text:
        return "the text is empty"
    if len(message.text) > TEXT_LIMIT:
        return f"the text has {len(message.text)} characters, {TEXT_LIMIT} are the most"
    for name, value in (("dedup_key", message.dedup_key), ("batch", message.batch)):
        if value is not None and len(value) > KEY_LIMIT:
            return f"the {name} has {len(value)} characters, {KEY_LIMIT} are the most"
    if message.expires_at is not None and message.expires_at <= max(now, message.send_after or now):
        return "it expires before it can be sent"
    return None


def stored(values: Sequence[str]) -> str | None:
    """Why the database could not keep these values, as a plain phrase; None if it can."""
    joined = "".join(values)
    if "\0" in joined:
        return "it has a NUL character"
    try:
        joined.encode()
    except UnicodeEncodeError:
        pass  # the error itself holds the text
    else:
        return None
    return "it is not UTF-8"


class _Counted(io.RawIOBase):
    """A file that counts what is read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # a buffer is one
        try:
            chunk = self._file.read(len(buffer))
        except OSError as error:
            raise Failed(f"The file cannot be read ({error.strerror}).") from None
        buffer[: len(chunk)] = chunk
        self.count += len(chunk)
        return len(chunk)


class CsvFile:
    """A CSV file with a header; separated by commas, semicolons or tabs, in UTF-8.

    Raises ValueError with a sentence if the file as a whole cannot be used.

    Attributes:
        longest: characters of the longest text so far.
        over: texts so far that are too long.
    """

    def __init__(
        self,
        file: BinaryIO,
        *,
        service_id: int,
        template: str | None,
        defaults: NewMessage,
        region: str,
        now: datetime,
    ) -> None:
        self._service_id = service_id
        self._template = None if template is None else Template(template)
        self._defaults = defaults
        self._region = region
        self._now = now
        self.longest = 0
        self.over = 0
        self._counted = _Counted(file)
        stream = io.TextIOWrapper(
            io.BufferedReader(self._counted, 2**16),
            encoding="utf-8-sig",
            errors="surrogateescape",
            newline="",
        )
        first = stream.readline()
        delimiter = max(",;\t", key=first.count)
        self._reader = csv.reader(chain([first], stream), delimiter=delimiter, strict=True)
        self._header = self._read_header()
        self._places = {
            name.lower(): place
            for place, name in enumerate(self._header)
            if name.lower() in COLUMNS
        }
        self._check_columns()

    @property
    def bytes_read(self) -> int:
        """Bytes of the file read so far."""
        return self._counted.count

    @property
    def ignored(self) -> list[str]:
        """Columns that neither are the outbox's nor stand in the template."""
        used = set(self._template.get_identifiers()) if self._template else set()
        return [name for name in self._header if name.lower() not in COLUMNS and name not in used]

    def __iter__(self) -> Iterator[tuple[int, NewMessage] | Wrong]:
        """The messages with their lines (the header's is 1), and the lines that are wrong."""
        while True:
            line = self._reader.line_num + 1
            try:
                row = next(self._reader)
            except StopIteration:
                return
            except csv.Error:
                yield Wrong(line, "its quotes do not match; nothing after it was read")
                return
            if not row:
                continue
            try:
                yield line, self._message(row)
            except ValueError as error:
                yield Wrong(line, str(error))

    def _read_header(self) -> list[str]:
        try:
            header = [name.strip() for name in next(self._reader, [])]
        except csv.Error:
            raise ValueError("the quotes of its first line do not match") from None
        if not header:
            raise ValueError("its first line is empty and should name the columns")
        if stored(header):
            raise ValueError("it is not a text in UTF-8; save it as 'CSV UTF-8'")
        return header

    def _check_columns(self) -> None:
        small = [name.lower() for name in self._header]
        doubled = sorted({name for name in small if small.count(name) > 1})
        if doubled:
            raise ValueError(f"it has the column {doubled[0]!r} twice")
        if "msisdn" not in self._places:
            raise ValueError("it has no column 'msisdn'; the first line names the columns")
        if self._template is None:
            if "text" not in self._places:
                raise ValueError("it has no column 'text'; add one, or write a template as --text")
            unknown = [name for name in small if name not in COLUMNS]
            if unknown:
                raise ValueError(
                    f"the column {unknown[0]!r} is none of the table outbox; "
                    "only a template (--text) takes other columns"
                )
            return
        missing = [name for name in self._template.get_identifiers() if name not in self._header]
        if missing:
            raise ValueError(f"it has no column {missing[0]!r}, which the template names")

    def _message(self, row: Sequence[str]) -> NewMessage:
        """The message of one line. Raises ValueError with a plain phrase."""
        if len(row) != len(self._header):
            raise ValueError(f"it has {len(row)} fields, {len(self._header)} are named")
        unfit = stored(row)
        if unfit is not None:
            raise ValueError(unfit)
        if self._template is None:
            text = row[self._places["text"]]
        else:
            text = self._template.substitute(dict(zip(self._header, row, strict=True)))
        self.longest = max(self.longest, len(text))
        self.over += len(text) > TEXT_LIMIT
        if self._cell(row, "service_id") not in {None, str(self._service_id)}:
            raise ValueError(f"its service_id is not {self._service_id}, which --service says")
        given = self._defaults
        message = NewMessage(
            msisdn=row[self._places["msisdn"]],
            text=text,
            extended=self._boolean(row, "extended", given.extended),
            priority=self._number(row, "priority", given.priority),
            send_after=self._time(row, "send_after", given.send_after),
            expires_at=self._time(row, "expires_at", given.expires_at),
            dedup_key=self._cell(row, "dedup_key"),
            batch=self._cell(row, "batch") or given.batch,
        )
        wrong = complaint(message, self._region, self._now)
        if wrong is not None:
            raise ValueError(wrong)
        return message

    def _cell(self, row: Sequence[str], column: str) -> str | None:
        place = self._places.get(column)
        return None if place is None else row[place].strip() or None

    def _boolean(self, row: Sequence[str], column: str, default: bool | None) -> bool | None:  # noqa: FBT001 - a value, not a switch
        cell = self._cell(row, column)
        if cell is None:
            return default
        if cell.lower() not in _BOOLEANS:
            raise ValueError(f"its {column} is neither true nor false")
        return _BOOLEANS[cell.lower()]

    def _number(self, row: Sequence[str], column: str, default: int | None) -> int | None:
        cell = self._cell(row, column)
        if cell is None:
            return default
        with suppress(ValueError):
            number = int(cell)
            if -(2**15) <= number < 2**15:
                return number
        raise ValueError(f"its {column} is no whole number from -32768 to 32767")

    def _time(self, row: Sequence[str], column: str, default: datetime | None) -> datetime | None:
        cell = self._cell(row, column)
        if cell is None:
            return default
        try:
            return moment(cell, self._now)
        except ValueError as error:
            raise ValueError(f"its {column} is wrong: {error}") from None
