"""How much is measured: enough for numbers to quote, or just enough to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Size:
    """How large the cases are."""

    rounds: int
    """Times that everything compared is run, one after the other in turn."""
    messages: int
    """Of the dispatcher in one run; the others send as many as take as long."""
    latency_messages: int
    """Inserted at 20 a second."""
    latency_rounds: int
    idle_seconds: float
    workers: tuple[int, ...]
    """How many workers share a database, in turn."""
    sessions: tuple[int, ...]
    """How many of them have their statements run alone."""
    pending: int
    """Messages of a large backlog."""
    few: int
    """Messages of a small backlog, against which a large one is held."""
    growth_rounds: int
    """Runs of the worker in each situation; its statements are timed in any case."""
    lived: int
    """Messages claimed and recorded before the size of the tables is looked at."""
    pace_messages: int
    log_lines: int
    reports_messages: int
    """Sent beside the reports, at a thousand a second or so."""


FULL: Final = Size(
    rounds=5,
    messages=10_000,
    latency_messages=160,
    latency_rounds=2,
    idle_seconds=20,
    workers=(1, 2, 4),
    sessions=(1, 2, 4),
    pending=1_000_000,
    few=10_000,
    growth_rounds=2,
    lived=1_000_000,
    pace_messages=400,
    log_lines=50_000,
    reports_messages=6_000,
)

QUICK: Final = Size(
    rounds=1,
    messages=2_000,
    latency_messages=20,
    latency_rounds=1,
    idle_seconds=1,
    workers=(1, 2),
    sessions=(1, 4),
    pending=8_000,
    few=2_000,
    growth_rounds=0,
    lived=10_000,
    pace_messages=30,
    log_lines=5_000,
    reports_messages=600,
)
