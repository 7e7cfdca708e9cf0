"""Logs: one JSON object a line on standard output, or coloured lines on a terminal."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

import orjson
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_LEVELS: Final = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}


class _Timestamp:
    """ISO 8601 in UTC with microseconds; the part up to the second is made once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def __call__(self, logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
        nanoseconds = time.time_ns()
        second = nanoseconds // 1_000_000_000
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        event["timestamp"] = f"{self._text}{nanoseconds // 1000 % 1_000_000:06d}Z"
        return event


def _render(logger: WrappedLogger, name: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=str)


class _Lines:
    """Writes lines to standard output.

    A reader that has gone or a disk that is full must not stop the work: such lines are lost.
    """

    def __init__(self) -> None:
        self.lost = 0
        """Lines that could not be written since the start."""
        self._kept: list[bytes] | None = None
        self._torn = b""

    def info(self, line: str | bytes) -> None:
        encoded = line if isinstance(line, bytes) else line.encode("utf-8", "replace")
        if self._kept is None:
            self._write([encoded])
        else:
            self._kept.append(encoded)

    debug = warning = error = info

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the lines of a block, which must not wait, at its end and at once."""
        kept: list[bytes] = []
        self._kept = kept
        try:
            yield
        finally:
            self._kept = None
            self._write(kept)

    def _write(self, lines: list[bytes]) -> None:
        # What is left of a line that was cut short must not spoil the next one.
        data = self._torn + b"".join(line + b"\n" for line in lines)
        written = 0
        try:
            while written < len(data):
                written += os.write(sys.stdout.fileno(), data[written:])
        except OSError:
            self.lost += data[written:].count(b"\n")
        if written:
            self._torn = b"" if data[written - 1 : written] == b"\n" else b"\n"


lines: Final = _Lines()
"""Where all lines go."""


def _first_line(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Name the kind and place of an exception; its text could hold a number or a message."""
    error = event.pop("exc_info", None)
    if isinstance(error, BaseException):
        event["exception"] = type(error).__name__
        event["at"] = _place(error)
    return event


def _place(error: BaseException) -> str:
    """Where an exception was raised: file and line, the innermost first, without any value."""
    places: list[str] = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_filename.rpartition('/')[2]}:{trace.tb_lineno}:{code.co_name}")
        trace = trace.tb_next
    return " < ".join(reversed(places[-6:]))


def configure(form: Literal["json", "console"], level: str) -> None:
    """Set logging up for this process; libraries' own loggers stay silent below warnings."""
    logging.basicConfig(handlers=[logging.NullHandler()], level=logging.WARNING, force=True)
    shared: list[Processor] = [structlog.processors.add_log_level, _Timestamp(), _first_line]
    if form == "json":
        shared.append(_render)
    else:
        shared.append(structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty()))
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        context_class=dict,
        logger_factory=lambda *_: lines,
        cache_logger_on_first_use=True,
    )
