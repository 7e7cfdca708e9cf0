"""A worker's right to send what it has claimed, as far as the worker itself can tell."""

from __future__ import annotations

from dispatcher import clock


class Lease:
    """The lease of one worker, reckoned by our clock so that it ends before the database's."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.worker_id = 0
        self.entered = ""
        """When the worker entered, as the database tells it."""
        self.database = ""
        """Which database that is."""
        self._began = 0.0
        self._until = 0.0

    def renewed(self, asked_at: float, *, unbroken: bool = True) -> None:
        """The database has renewed it; `asked_at` is when it was asked, by our clock.

        A lease that ran out before, by our clock or by the database's (not `unbroken`), is a new
        one: others may have taken what was claimed under the old one.
        """
        if asked_at >= self._until or not unbroken:
            # Not when it was asked: what was claimed between may have been taken as well.
            self._began = clock.now()
        self._until = asked_at + self.seconds

    def valid(self) -> bool:
        """Whether others take this worker for alive."""
        return clock.now() < self._until

    def covers(self, claimed_at: float, now: float) -> bool:
        """Whether a claim of that time is certainly still this worker's."""
        return claimed_at >= self._began and now < self._until
