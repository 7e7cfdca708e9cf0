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
    idle_seconds: float
    pending: int
    """Messages of a large backlog."""
    few: int
    """Messages of a small backlog, against which a large one is held."""
    growth_rounds: int
    lived: int
    """Messages claimed and recorded before the size of the tables is looked at."""
    pace_messages: int
    peers: bool
    """Whether the slow peers take part."""


FULL: Final = Size(
    rounds=5,
    messages=15_000,
    latency_messages=200,
    idle_seconds=20,
    pending=1_000_000,
    few=10_000,
    growth_rounds=3,
    lived=1_000_000,
    pace_messages=200,
    peers=True,
)

QUICK: Final = Size(
    rounds=1,
    messages=5_000,
    latency_messages=40,
    idle_seconds=8,
    pending=50_000,
    few=5_000,
    growth_rounds=1,
    lived=20_000,
    pace_messages=60,
    peers=True,
)
