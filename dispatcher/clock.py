"""The clock of this machine by which leases, slots and deadlines are kept."""

from __future__ import annotations

import time
from typing import Final

# Only this one goes on while the machine sleeps, so a lease cannot look valid after a suspend.
_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now() -> float:
    """Seconds on a clock that never jumps and counts suspend where the system can."""
    return time.clock_gettime(_CLOCK)
