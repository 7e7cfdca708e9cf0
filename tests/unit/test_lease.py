from __future__ import annotations

from collections.abc import Callable

import pytest

from dispatcher import clock
from dispatcher.lease import Lease

SetClock = Callable[[float], None]


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> SetClock:
    """Sets the clock of this machine."""

    def set_to(now: float) -> None:
        monkeypatch.setattr(clock, "now", lambda: now)

    set_to(1000.0)
    return set_to


def test_none_before_the_first_beat(at: SetClock) -> None:
    """A worker that was never entered may send nothing."""
    lease = Lease(30)

    assert not lease.valid()
    assert not lease.covers(1000.0, 1000.0)


def test_runs_from_when_it_was_asked(at: SetClock) -> None:
    """It ends so long after the question as the database grants, however late the answer came."""
    lease = Lease(30)
    lease.renewed(1000.0)

    at(1029.9)
    assert lease.valid()
    at(1030.0)
    assert not lease.valid()


def test_covers_what_was_claimed_under_it(at: SetClock) -> None:
    """A claim is this worker's while the lease goes on without a gap."""
    lease = Lease(30)
    lease.renewed(1000.0)
    lease.renewed(1020.0)

    assert lease.covers(1001.0, 1049.9)
    assert not lease.covers(1001.0, 1050.0)


def test_gap_that_only_the_database_saw(at: SetClock) -> None:
    """A beat on its way when the lease ran out covers nothing claimed until its answer came."""
    lease = Lease(30)
    lease.renewed(1000.0)
    at(1030.5)
    lease.renewed(1029.0, unbroken=False)

    at(1031.0)
    assert lease.valid()
    assert not lease.covers(1029.5, 1031.0)
    assert lease.covers(1030.5, 1031.0)


def test_new_lease_covers_nothing_old(at: SetClock) -> None:
    """After a gap others may have taken the claims, so only what is claimed anew is covered."""
    lease = Lease(30)
    lease.renewed(1000.0)
    at(1030.0)
    lease.renewed(1030.0)

    at(1031.0)
    assert lease.valid()
    assert not lease.covers(1029.0, 1031.0)
    assert lease.covers(1030.0, 1031.0)
