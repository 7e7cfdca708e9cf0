from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatcher import spool
from dispatcher.db.outbox import Result
from dispatcher.domain.message import Status
from dispatcher.domain.outcomes import Outcome, classify, doubt, never_left

ACCEPTED = Result(
    id=1,
    claim_no=2,
    worker_id=3,
    service_id=42,
    outcome=classify(200, b"MSG_OK:abc"),
    sent_ago=1.5,
    seconds=0.25,
)
IN_DOUBT = Result(4, 1, 3, 42, doubt("No answer came (reset)."), sent_ago=2.0, seconds=15.0)
NEVER_LEFT = Result(5, 1, 3, 42, never_left("refused"), retry_in=1.25, failed=True)

NUMBERS = st.floats(0, 1e6)
RESULTS = st.builds(
    Result,
    id=st.integers(1, 2**63 - 1),
    claim_no=st.integers(0, 2**31 - 1),
    worker_id=st.integers(1, 2**63 - 1),
    service_id=st.integers(0, 2**63 - 1),
    outcome=st.builds(
        Outcome,
        st.sampled_from(Status),
        st.none(),
        st.none() | st.text(max_size=200),
        st.none() | st.text(max_size=64),
        st.none() | st.text(max_size=80),
        counts_attempt=st.booleans(),
        costs_quota=st.booleans(),
    ),
    retry_in=st.none() | NUMBERS,
    failed=st.booleans(),
    sent_ago=st.none() | NUMBERS,
    seconds=NUMBERS,
)


@pytest.fixture
def told() -> Iterator[list[structlog.typing.EventDict]]:
    """What is logged meanwhile."""
    with structlog.testing.capture_logs() as events:
        yield events


def lines(folder: Path) -> list[bytes]:
    """All that is spooled."""
    return [
        line for path in (folder / "spool").iterdir() for line in path.read_bytes().splitlines()
    ]


def test_nothing_to_keep(tmp_path: Path) -> None:
    """Without results nothing is written, not even a folder."""
    assert spool.write(tmp_path, 3, "17", [], database="7.8.9") is None
    assert list(tmp_path.iterdir()) == []


def test_written_for_its_owner_only(tmp_path: Path) -> None:
    """The file is named by the worker, and only its owner may read it."""
    path = spool.write(tmp_path / "new", 3, "17", [ACCEPTED], database="7.8.9")

    assert path is not None
    assert path.parent == tmp_path / "new" / "spool"
    assert path.name.startswith("3-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_second_write_adds(tmp_path: Path) -> None:
    """What was written before is never overwritten."""
    first = spool.write(tmp_path, 3, "17", [ACCEPTED], database="7.8.9")
    second = spool.write(tmp_path, 3, "17", [IN_DOUBT, NEVER_LEFT], database="7.8.9")

    assert first is not None
    assert second is not None
    assert list(spool._read(first)) == [ACCEPTED]
    assert list(spool._read(second)) == [IN_DOUBT, NEVER_LEFT]


@given(results=st.lists(RESULTS, min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_result_comes_back(tmp_path: Path, results: list[Result]) -> None:
    """Whatever the provider answered, what is read back is what was written."""
    path = spool.write(tmp_path, 3, "17", results, database="7.8.9")

    assert path is not None
    try:
        assert list(spool._read(path)) == results
    finally:
        path.unlink()


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"{}",
        b'{"id": 1}',
        b'{"id": "x", "claim_no": 1, "worker_id": 1, "service_id": 1, "status": "accepted"}',
        b'{"id": 1, "claim_no": 1, "worker_id": 1, "service_id": 1, "status": "lost"}',
        b'{"id":1,"claim_no":1,"worker_id":1,"service_id":1,"status":"pending","retry_in":"soon"}',
        b'{"id": 1, "claim_no": null, "worker_id": 1, "service_id": 1, "status": "accepted"}',
        b"\xff\xfe\x00",
    ],
)
def test_torn_line_costs_only_itself(
    tmp_path: Path, told: list[structlog.typing.EventDict], bad: bytes
) -> None:
    """A line that a crash tore is told with its number, and all others are read."""
    path = spool.write(tmp_path, 3, "17", [ACCEPTED, IN_DOUBT], database="7.8.9")
    assert path is not None
    first, second = lines(tmp_path)
    path.write_bytes(first + b"\n" + bad + b"\n" + second + b"\n")

    assert list(spool._read(path)) == [ACCEPTED, IN_DOUBT]
    assert [(event["event"], event["line"]) for event in told] == [("spool.torn", 2)]


def test_nothing_private_is_spooled(tmp_path: Path) -> None:
    """A spooled result names its message by its id: no number and no text of a message."""
    spool.write(tmp_path, 3, "17", [ACCEPTED], database="7.8.9")

    (line,) = lines(tmp_path)
    assert b"msisdn" not in line
    assert b"text" not in line
