"""How long to wait before trying again."""

from __future__ import annotations

from typing import Final

JITTER: Final = 0.25
"""Jitter adds up to this share of a wait; it never takes away."""

MESSAGE_FIRST: Final = 1.0
MESSAGE_MOST: Final = 300.0

UNREACHABLE_FIRST: Final = 0.5
UNREACHABLE_MOST: Final = 10.0


def backoff(failures: int, *, first: float, most: float, chance: float) -> float:
    """Seconds to wait after the given number of failures in a row (at least 1).

    Doubles from `first` up to `most`, then adds up to a quarter; `chance` is uniform in [0, 1).
    """
    doublings = min(failures - 1, 30)
    return float(min(first * 2**doublings, most)) * (1 + JITTER * chance)


def message_delay(failures: int, chance: float) -> float:
    """Seconds that one message waits after requests for it that never left."""
    return backoff(failures, first=MESSAGE_FIRST, most=MESSAGE_MOST, chance=chance)


def unreachable_delay(failures: int, chance: float) -> float:
    """Seconds that a worker waits while the provider cannot be reached at all."""
    return backoff(failures, first=UNREACHABLE_FIRST, most=UNREACHABLE_MOST, chance=chance)
