from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dispatcher.domain.msisdn import masked, normalise

MOBILE = "359881234567"
DIGITS = st.text("0123456789", min_size=9, max_size=14)


@pytest.mark.parametrize(
    ("written", "region", "number"),
    [
        ("359881234567", "BG", MOBILE),
        ("+359881234567", "BG", MOBILE),
        ("+359 88 123 4567", "BG", MOBILE),
        ("+359-88-123-4567", "BG", MOBILE),
        ("+359 (88) 123.45/67", "BG", MOBILE),
        ("+359\u00a088\u202f123\t4567", "BG", MOBILE),
        ("00359881234567", "BG", MOBILE),
        ("00 359 88 123 4567", "BG", MOBILE),
        ("0881234567", "BG", MOBILE),
        ("088 123 4567", "BG", MOBILE),
        ("(088) 123-4567", "BG", MOBILE),
        ("359 88 123 4567", "BG", MOBILE),
        ("  359881234567\n", "BG", MOBILE),
        ("02 981 1234", "BG", "35929811234"),
        ("+44 20 7946 0958", "BG", "442079460958"),
        ("020 7946 0958", "GB", "442079460958"),
        ("01712345678", "DE", "491712345678"),
        ("4915123456789", "BG", "4915123456789"),
        # Canonical already: the provider judges, even where no plan knows the number.
        ("1234567890", "BG", "1234567890"),
        ("999999999999999", "BG", "999999999999999"),
    ],
)
def test_usual_ways_of_writing(written: str, region: str, number: str) -> None:
    """Each usual way of writing a number gives its international digits."""
    assert normalise(written, region) == number


@pytest.mark.parametrize(
    "written",
    [
        "",
        " ",
        "+",
        "00",
        "-",
        "hello",
        "123",
        "0",
        "0881",
        "088123456789012345",
        "1234567890123456",
        "+359 88 123 4567 8901 234",
        "+999 88 123 4567",
        "+35988123456x",
        "359881234567;359887654321",
        "359881234567&text=free",
        "++359881234567",
        "+359+881234567",
        "359 88 123\n4567",
        "tel:+359881234567",
        "٣٥٩٨٨١٢٣٤٥٦٧",
        "³⁵⁹881234567",
        "0" * 12,
        "\0",
    ],
)
def test_what_is_no_number(written: str) -> None:
    """What cannot be dialled is no number, and nothing is guessed."""
    assert normalise(written, "BG") is None


@given(first=st.sampled_from("123456789"), rest=DIGITS, space=st.text(" \t\r\n", max_size=2))
def test_canonical_is_left_alone(first: str, rest: str, space: str) -> None:
    """Any 10 to 15 digits without a leading zero are taken as they are."""
    assert normalise(space + first + rest + space, "BG") == first + rest


@given(written=st.text(max_size=30) | st.text("+0123456789 -./()", max_size=25))
@example(written="+3598812345670")
@example(written="0" * 14)
def test_anything_written(written: str) -> None:
    """Whatever is written, the result can be sent or is none, and reading it again is the same."""
    number = normalise(written, "BG")

    if number is not None:
        assert re.fullmatch("[1-9][0-9]{9,14}", number, re.ASCII)
        assert normalise(number, "BG") == number


@pytest.mark.parametrize(
    ("number", "shown"),
    [
        ("359881234567", "35988***4567"),
        ("999999999999999", "99999***9999"),
        ("0881234567", "088***4567"),
        ("+359 88 123 4567", "35988***4567"),
        ("00359881234567", "00359***4567"),
        ("088123456", "***"),
        ("", "***"),
        ("Your code is 4711", "***"),
        ("359881234567&text=Your code is 4711", "***"),
    ],
)
def test_masked(number: str, shown: str) -> None:
    """At least three digits of a number are hidden, and all of what is no number."""
    assert masked(number) == shown
