from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.domain.retry import JITTER, backoff, message_delay, unreachable_delay

CHANCES = st.floats(0, 1, exclude_max=True)
FAILURES = st.integers(1, 10_000)


@pytest.mark.parametrize(
    ("failures", "seconds"),
    [(1, 1), (2, 2), (3, 4), (8, 128), (9, 256), (10, 300), (11, 300), (10_000, 300)],
)
def test_message_delay_doubles(failures: int, seconds: float) -> None:
    """A message waits a second, then twice as long each time, up to five minutes."""
    assert message_delay(failures, 0) == seconds


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 0.5), (2, 1), (3, 2), (4, 4), (5, 8), (6, 10), (10_000, 10)]
)
def test_unreachable_delay_doubles(failures: int, seconds: float) -> None:
    """A worker waits half a second, then twice as long each time, up to ten seconds."""
    assert unreachable_delay(failures, 0) == seconds


@given(failures=FAILURES, chance=CHANCES, first=st.floats(0.001, 100), most=st.floats(0.001, 1e6))
def test_jitter_only_adds(failures: int, chance: float, first: float, most: float) -> None:
    """Jitter adds up to a quarter to a wait, and never takes anything away."""
    plain = backoff(failures, first=first, most=most, chance=0)

    assert plain <= backoff(failures, first=first, most=most, chance=chance)
    assert backoff(failures, first=first, most=most, chance=chance) <= plain * (1 + JITTER)


@given(failures=FAILURES, chance=CHANCES)
def test_more_failures_wait_no_less(failures: int, chance: float) -> None:
    """With the same luck a further failure never shortens the wait."""
    assert message_delay(failures, chance) <= message_delay(failures + 1, chance)
    assert unreachable_delay(failures, chance) <= unreachable_delay(failures + 1, chance)
