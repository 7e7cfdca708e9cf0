import json
import re
from itertools import product

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.domain.message import Status
from dispatcher.domain.reports import (
    FIELDS,
    REPORTED,
    WORDS,
    advance,
    from_form,
    from_json,
    gathered,
    last,
    meaning,
    tellable,
)

REPORTS = sorted(REPORTED)
ENDS = (Status.DELIVERED, Status.UNDELIVERABLE)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_means_the_same_in_any_case_and_between_spaces(word: str) -> None:
    """A word of the built-in table is known however it is written."""
    assert meaning(word) is meaning(f" {word.lower()}\n") is meaning(word.title()) is WORDS[word]


def test_every_word_of_the_contract_is_known() -> None:
    """The built-in table is the one that the documents promise."""
    told = {
        Status.ENROUTE: "ENROUTE ACCEPTD ACCEPTED SENT BUFFERED",
        Status.DELIVERED: "DELIVRD DELIVERED",
        Status.UNDELIVERABLE: (
            "UNDELIV UNDELIVERABLE UNDELIVERED EXPIRED REJECTD REJECTED DELETED FAILED"
        ),
    }
    assert {word: status for status, words in told.items() for word in words.split()} == WORDS


@pytest.mark.parametrize("word", ["", "UNKNOWN", "DELIVRDX", "DELI VRD", "1"])
def test_any_other_word_means_nothing(word: str) -> None:
    """A word outside the table has no meaning rather than a guessed one."""
    assert meaning(word) is None


def test_a_setting_may_replace_the_words() -> None:
    """The provider's own words can be given in place of the built-in ones."""
    assert meaning("ok", {"OK": Status.DELIVERED}) is Status.DELIVERED
    assert meaning("DELIVRD", {"OK": Status.DELIVERED}) is None


@pytest.mark.parametrize(("current", "reported"), [*product(Status, REPORTS)])
def test_a_report_moves_a_message_forward_or_not_at_all(current: Status, reported: Status) -> None:
    """Only an accepted message that has not come to its end moves, and never backwards."""
    moves = current is Status.ACCEPTED or (current is Status.ENROUTE and reported in ENDS)
    assert advance(current, reported) is (reported if moves else current)


@given(st.lists(st.sampled_from(REPORTS)))
def test_the_first_end_decides_whatever_follows(reported: list[Status]) -> None:
    """However reports are doubled, late or swapped, the first that tells an end stays."""
    status = Status.ACCEPTED
    for report in reported:
        status = advance(status, report)
    ends = [report for report in reported if report in ENDS]
    assert status is (ends[0] if ends else Status.ENROUTE if reported else Status.ACCEPTED)


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        (b"", []),
        (b"sms_id=1&status=DELIVRD", [("sms_id", "1"), ("status", "DELIVRD")]),
        (b"sms_id=a%2Bb+c&status=", [("sms_id", "a+b c"), ("status", "")]),
        (b"a=1&a=2", [("a", "1"), ("a", "2")]),
        ("ime=Яна&x=%D0%AF".encode(), [("ime", "Яна"), ("x", "Я")]),
        (b"a=\xff&b=%ff%00", [("a", "\ufffd"), ("b", "\ufffd\0")]),
        (b"a=1;b=2", [("a", "1;b=2")]),
    ],
)
def test_a_form_is_read_whatever_its_bytes(data: bytes, pairs: list[tuple[str, str]]) -> None:
    """A query or form gives its pairs, with a mark for what is no UTF-8."""
    assert from_form(data) == pairs


def test_too_many_parameters_are_refused() -> None:
    """A report has at most a hundred parameters, in either notation."""
    most = [(f"p{n}", "1") for n in range(FIELDS)]
    assert from_form("&".join(f"{name}=1" for name, _ in most).encode()) == most
    assert from_form("&".join(f"{name}=1" for name, _ in [*most, ("q", "")]).encode()) is None
    assert from_json(json.dumps(dict(most)).encode()) == most
    assert from_json(json.dumps({**dict(most), "q": "1"}).encode()) is None


@pytest.mark.parametrize(
    ("data", "pairs"),
    [
        ("{}", []),
        ('{"sms_id": "a", "status": "SENT"}', [("sms_id", "a"), ("status", "SENT")]),
        ('{"sms_id": 12345678901234567890123}', [("sms_id", "12345678901234567890123")]),
        ('{"a": 1.50, "b": true, "c": null}', [("a", "1.50"), ("b", "true"), ("c", "")]),
        ('{"a": {"b": ["я", 2]}}', [("a", '{"b": ["я", "2"]}')]),
        ('{"a": NaN}', [("a", "NaN")]),
    ],
)
def test_a_json_object_gives_its_members_as_text(data: str, pairs: list[tuple[str, str]]) -> None:
    """Numbers keep their digits, null is empty and what is nested stays JSON."""
    assert from_json(data.encode()) == pairs


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'"a"', b"1", b"null", b"{", b'{"a": 01}', b"\xff\xfe\xff", b'{"a":' * 3000],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    """Broken, nested without end or of another kind: none of it is a report."""
    assert from_json(data) is None


@given(st.binary(max_size=300))
def test_whatever_comes_can_be_kept(data: bytes) -> None:
    """No bytes give parameters that jsonb could not hold."""
    for pairs in (from_form(data), from_json(data)):
        assert_can_be_kept(pairs)


@given(
    st.dictionaries(
        st.text(st.characters(codec=None)), st.text(st.characters(codec=None)), max_size=5
    )
)
def test_whatever_json_escapes_can_be_kept(members: dict[str, str]) -> None:
    r"""NUL and lone surrogates, which JSON can write as \u escapes, are marked."""
    assert_can_be_kept(from_json(json.dumps(members).encode()))


def assert_can_be_kept(pairs: list[tuple[str, str]] | None) -> None:
    """Asserts what jsonb asks for."""
    kept = orjson.dumps(gathered(pairs or [])).decode()
    assert "\0" not in kept
    assert r"\u0000" not in re.sub(r"\\\\", "", kept)


def test_a_parameter_given_twice_keeps_both_and_its_last_counts() -> None:
    """Nothing that came is dropped, and what is read is the last of several."""
    params = gathered([("a", "1"), ("b", " x "), ("a", "2"), ("a", " 3\t")])
    assert params == {"a": ["1", "2", " 3\t"], "b": " x "}
    assert [last(params, name) for name in ("a", "b", "c")] == ["3", "x", ""]


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("DELIVRD", "DELIVRD"),
        ("state 8", "state 8"),
        ("359881234567", None),
        ("id 12345", None),
        ("Здравей", None),
        ("a\nb", None),
        ("x" * 33, None),
    ],
)
def test_a_word_that_could_hold_a_number_or_a_text_is_not_told(word: str, told: str | None) -> None:
    """The log has the provider's words, and nothing that was sent in their place by mistake."""
    assert tellable(word) == told
