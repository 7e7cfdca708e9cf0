"""Logs: one JSON object a line on standard output, or coloured lines on a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Literal

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
    factory: Callable[..., Any]
    if form == "json":
        shared.append(_render)
        factory = structlog.BytesLoggerFactory(sys.stdout.buffer)
    else:
        shared.append(structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty()))
        factory = structlog.PrintLoggerFactory(sys.stdout)
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        context_class=dict,
        logger_factory=factory,
        cache_logger_on_first_use=True,
    )
