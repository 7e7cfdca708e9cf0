"""Faults by rate and by seed."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.simulator.faults import (
    BROKEN,
    ERRORS,
    GARBAGE,
    Fault,
    Faults,
    between,
    draw,
    one_of,
    spoiled,
)


@given(
    seed=st.integers(), service=st.text(), msisdn=st.text(), text=st.text(), nth=st.integers(1, 9)
)
def test_draw_depends_on_its_arguments_alone(
    seed: int, service: str, msisdn: str, text: str, nth: int
) -> None:
    """The same request draws the same numbers, each at least 0 and below 1."""
    drawn = draw(seed, service, msisdn, text, nth)

    assert drawn == draw(seed, service, msisdn, text, nth)
    assert all(0 <= number < 1 for number in drawn)


def test_draw_differs() -> None:
    """Another seed, message or repetition draws other numbers, and no two numbers are the same."""
    draws = [
        draw(1, "42", "359881234567", "a", 1),
        draw(2, "42", "359881234567", "a", 1),
        draw(1, "43", "359881234567", "a", 1),
        draw(1, "42", "359881234568", "a", 1),
        draw(1, "42", "359881234567", "b", 1),
        draw(1, "42", "359881234567", "a", 2),
        draw(1, None, None, None, 1),
    ]

    assert len({number for drawn in draws for number in drawn}) == 8 * len(draws)


def test_faults_come_at_their_rates() -> None:
    """Over many messages each fault takes its share, and the rest is answered."""
    faults = Faults(drop=0.1, reset=0.05, hang=0.05, error=0.1, garbage=0.1, late=0.2)

    counts = Counter(
        one_of(draw(5, "42", str(n), "text", 1).fault, faults.rates) for n in range(20_000)
    )

    expected: dict[Fault | None, float] = {**dict(faults.rates), None: 0.4}
    assert {fault: count / 20_000 for fault, count in counts.items()} == pytest.approx(
        expected, abs=0.01
    )


@pytest.mark.parametrize(
    ("number", "choice"),
    [(0.0, "a"), (0.249, "a"), (0.25, "c"), (0.749, "c"), (0.75, None), (0.999, None)],
)
def test_one_of(number: float, choice: str | None) -> None:
    """A number falls on the choice whose stretch it lies in; one with no rate is never chosen."""
    assert one_of(number, (("a", 0.25), ("b", 0.0), ("c", 0.5))) == choice


def test_no_rates_no_fault() -> None:
    """Without rates there is no fault, not even for the smallest number."""
    assert one_of(0.0, Faults().rates) is None


def test_between() -> None:
    """A drawn number stands for a point of the span."""
    assert [between((1.0, 3.0), number) for number in (0.0, 0.25, 0.5)] == [1.0, 1.5, 2.0]


def test_errors_are_whole_answers() -> None:
    """Each 5xx is drawn, as an answer with which the connection may go on."""
    contents = {spoiled(Fault.ERROR, n / 100, keep=True) for n in range(100)}

    assert {int(content.split()[1]) for content, _ in contents} == set(ERRORS)
    assert all(keep for _, keep in contents)


def test_garbage_is_never_an_answer_of_the_table() -> None:
    """Each piece of garbage is drawn; what breaks the protocol ends the connection."""
    contents = [spoiled(Fault.GARBAGE, n / 100, keep=True) for n in range(100)]

    whole = {content.partition(b"\r\n\r\n")[2] for content, keep in contents if keep}
    assert whole == set(GARBAGE)
    assert {content for content, keep in contents if not keep} == set(BROKEN)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drop": 1.1}, "faults: drop must be a share from 0 to 1, but is 1.1."),
        ({"late": -0.1}, "faults: late must be a share from 0 to 1, but is -0.1."),
        (
            {"drop": 0.6, "hang": 0.6},
            "faults: drop, reset, hang, error, garbage, late together must not exceed 1.",
        ),
        ({"latency": (0.2, 0.1)}, "faults: latency must be seconds MIN:MAX, but is 0.2:0.1."),
        ({"latency": (-1.0, 0.1)}, "faults: latency must be seconds MIN:MAX, but is -1:0.1."),
    ],
)
def test_impossible_faults(change: dict[str, Any], sentence: str) -> None:
    """Rates and spans that cannot be are refused in one sentence."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        Faults(**change)

    assert str(caught.value) == sentence
