from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.domain.sharing import share


@pytest.mark.parametrize(
    ("free", "held", "places"),
    [
        (0, {1: 0}, {}),
        (-3, {1: 0}, {}),
        (5, {}, {}),
        (5, {1: 0}, {1: 5}),
        (4, {1: 0, 2: 0}, {1: 2, 2: 2}),
        (3, {2: 0, 1: 0}, {2: 2, 1: 1}),
        (3, {1: 10, 2: 0}, {2: 3}),
        (5, {1: 2, 2: 0, 3: 1}, {2: 3, 3: 1, 1: 1}),
        (2, {1: 0, 2: 0, 3: 0}, {1: 1, 2: 1}),
    ],
)
def test_shares(free: int, held: dict[int, int], places: dict[int, int]) -> None:
    """Places go one by one to the service that holds the fewest, ties in the order given."""
    assert share(free, held) == places


@given(
    free=st.integers(0, 200),
    held=st.dictionaries(st.integers(1, 9), st.integers(0, 50), min_size=1),
)
def test_even(free: int, held: dict[int, int]) -> None:
    """All places are given, and nobody who got one has over one more than anybody else."""
    places = share(free, held)

    after = {service: count + places.get(service, 0) for service, count in held.items()}
    assert sum(places.values()) == free
    assert all(after[service] <= min(after.values()) + 1 for service in places)
    assert all(count > 0 for count in places.values())
