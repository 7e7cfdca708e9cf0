import io
import tracemalloc
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.commands.csv_file import SHOWN, CsvFile, Findings, Template, Wrong
from dispatcher.commands.failures import Failed
from dispatcher.db.enqueue import NewMessage

NOW = datetime(2026, 11, 22, 10, 0, tzinfo=UTC)
NUMBER = "359881234567"
HEAD = "msisdn,text,extended,priority,send_after,expires_at,dedup_key,batch"


def read(
    content: str | bytes, template: str | None = None, defaults: NewMessage | None = None
) -> CsvFile:
    """A file with this content, for service 42."""
    return CsvFile(
        io.BytesIO(content if isinstance(content, bytes) else content.encode()),
        service_id=42,
        template=template,
        defaults=defaults or NewMessage("", ""),
        region="BG",
        now=NOW,
    )


def test_all_columns() -> None:
    """Every column of the outbox is read, and an empty cell leaves it to the default."""
    (full, empty) = read(
        f"{HEAD}\n{NUMBER},Hi,no,-5,2h,2026-12-01T10:00Z,k,b\n0881234567,  Hi  ,,,,,,\n"
    )

    assert full == (
        2,
        NewMessage(
            NUMBER,
            "Hi",
            extended=False,
            priority=-5,
            send_after=NOW + timedelta(hours=2),
            expires_at=datetime(2026, 12, 1, 10, 0, tzinfo=UTC),
            dedup_key="k",
            batch="b",
        ),
    )
    assert empty == (3, NewMessage("0881234567", "  Hi  "))


def test_options_fill_empty_cells() -> None:
    """What the options say holds where a cell says nothing."""
    given = NewMessage("", "", extended=False, priority=3, batch="may")

    lines = list(read(f"msisdn,text,priority\n{NUMBER},Hi,\n{NUMBER},Hi,1\n", defaults=given))

    assert lines == [
        (2, NewMessage(NUMBER, "Hi", extended=False, priority=3, batch="may")),
        (3, NewMessage(NUMBER, "Hi", extended=False, priority=1, batch="may")),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_delimiters(delimiter: str) -> None:
    """The header tells what separates the fields, and spreadsheets' choices all work."""
    content = f'msisdn,text\r\n{NUMBER},"a{delimiter}b"\r\n'.replace(",", delimiter)

    assert list(read("\ufeff" + content)) == [(2, NewMessage(NUMBER, f"a{delimiter}b"))]


def test_template() -> None:
    """A template takes any column by its name, and a dollar sign if it is doubled."""
    file = read(
        f"msisdn,number,due date,note\n{NUMBER},17,Friday,x\n",
        "Invoice $number: $$5 due ${due date}",
    )

    assert list(file) == [(2, NewMessage(NUMBER, "Invoice 17: $5 due Friday"))]
    assert file.ignored == ["note"]
    assert (file.longest, file.over) == (25, 0)


def test_name_ends_before_other_letters() -> None:
    """A name in a template is of ASCII letters, so a currency may follow it at once."""
    assert Template("$amountлв").get_identifiers() == ["amount"]


def test_lines_are_those_of_the_file() -> None:
    """A message is named by the line on which it begins, whatever lies in between."""
    file = read(f'msisdn,text\n\n{NUMBER},"a\nb"\n{NUMBER},\n{NUMBER},c\n')

    assert list(file) == [
        (3, NewMessage(NUMBER, "a\nb")),
        Wrong(5, "the text is empty"),
        (6, NewMessage(NUMBER, "c")),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (f"{NUMBER},Hi", "it has 2 fields, 8 are named"),
        (f"{NUMBER},Hi,,,,,,,", "it has 9 fields, 8 are named"),
        (",Hi,,,,,,", "the number is not one that can be dialled"),
        ("088,Hi,,,,,,", "the number is not one that can be dialled"),
        (f"{NUMBER},,,,,,,", "the text is empty"),
        (f"{NUMBER},{'я' * 161},,,,,,", "the text has 161 characters, 160 are the most"),
        (f"{NUMBER},Hi,maybe,,,,,", "its extended is neither true nor false"),
        (f"{NUMBER},Hi,,x,,,,", "its priority is no whole number from -32768 to 32767"),
        (f"{NUMBER},Hi,,40000,,,,", "its priority is no whole number from -32768 to 32767"),
        (f"{NUMBER},Hi,,,,,{'k' * 501},", "the dedup_key has 501 characters, 500 are the most"),
        (f"{NUMBER},Hi,,,,,,{'b' * 501}", "the batch has 501 characters, 500 are the most"),
        (f"{NUMBER},Hi,,,,2020-01-01T00:00Z,,", "it expires before it can be sent"),
        (f"{NUMBER},Hi,,,2h,1h,,", "it expires before it can be sent"),
        (
            f"{NUMBER},Hi,,,soon,,,",
            "its send_after is wrong: it is no time such as 2030-12-31T18:00+02:00 or 2h",
        ),
        (f"{NUMBER},H\0i,,,,,,", "it has a NUL character"),
    ],
)
def test_wrong_lines(line: str, reason: str) -> None:
    """A line that could never be sent is named with its reason, and the next is read."""
    assert list(read(f"{HEAD}\n{line}\n{NUMBER},Hi,,,,,,\n")) == [
        Wrong(2, reason),
        (3, NewMessage(NUMBER, "Hi")),
    ]


def test_text_of_160_characters() -> None:
    """160 characters are code points, not bytes."""
    assert list(read(f"msisdn,text\n{NUMBER},{'😀' * 160}\n")) == [
        (2, NewMessage(NUMBER, "😀" * 160))
    ]


def test_other_service() -> None:
    """A line for another service than the one given is wrong."""
    file = read(f"msisdn,text,service_id\n{NUMBER},Hi,42\n{NUMBER},Hi,43\n{NUMBER},Hi,\n")

    assert [line for line in file if isinstance(line, Wrong)] == [
        Wrong(3, "its service_id is not 42, which --service says")
    ]


def test_undecodable_line() -> None:
    """A line that is not UTF-8 is named, and only that line."""
    content = f"msisdn,text\n{NUMBER},".encode() + "Готово".encode("cp1251")

    assert list(read(content + f"\n{NUMBER},Hi\n".encode())) == [
        Wrong(2, "it is not UTF-8"),
        (3, NewMessage(NUMBER, "Hi")),
    ]


def test_quotes_that_do_not_match() -> None:
    """An open quote swallows no message in silence."""
    assert list(read(f'msisdn,text\n{NUMBER},a\n{NUMBER},"b\n{NUMBER},c\n')) == [
        (2, NewMessage(NUMBER, "a")),
        Wrong(3, "its quotes do not match; nothing after it was read"),
    ]


@pytest.mark.parametrize(
    ("content", "template", "complaint"),
    [
        (b"", None, "its first line is empty"),
        (b"\nmsisdn,text\n", None, "its first line is empty"),
        ("msisdn,text\n".encode("utf-16"), None, "it is not a text in UTF-8"),
        (b'"msisdn,text\n', None, "the quotes of its first line"),
        (b"text\nHi\n", None, "it has no column 'msisdn'"),
        (b"msisdn\n1\n", None, "it has no column 'text'"),
        (b"msisdn,text,msisdn\n", None, "it has the column 'msisdn' twice"),
        (b"msisdn,text,Text\n", None, "it has the column 'text' twice"),
        (b"msisdn,text,send_afer\n", None, "the column 'send_afer' is none of the table outbox"),
        (b"msisdn,name\n", "Dear $nmae", "it has no column 'nmae', which the template names"),
    ],
)
def test_unusable_files(content: bytes, template: str | None, complaint: str) -> None:
    """A file that cannot be used as a whole is refused before its first line."""
    with pytest.raises(ValueError, match=f"^{complaint}"):
        read(content, template)


class _Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:  # noqa: ARG002 - as its base has it
        raise OSError(5, "Input/output error")


def test_unreadable_file() -> None:
    """A disk that fails while it is read is told in one sentence."""
    with pytest.raises(Failed, match=r"^The file cannot be read \(Input/output error\)\.$"):
        CsvFile(
            _Broken(),
            service_id=42,
            template=None,
            defaults=NewMessage("", ""),
            region="BG",
            now=NOW,
        )


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))))
def test_texts_come_through_whole(texts: list[str]) -> None:
    """Whatever a text holds, quoted as CSV has it, it comes out as it went in."""
    lines = "".join('{},"{}"\r\n'.format(NUMBER, text.replace('"', '""')) for text in texts)

    found = [
        line[1].text if isinstance(line, tuple) else line.reason
        for line in read("msisdn,text\r\n" + lines)
    ]

    assert found == [
        text
        if 0 < len(text) <= 160
        else "the text is empty"
        if not text
        else f"the text has {len(text)} characters, 160 are the most"
        for text in texts
    ]


def test_memory_does_not_grow_with_the_file() -> None:
    """A file of any length is read in the same little memory."""
    file = read("msisdn,text\n" + f"{NUMBER},Your invoice is ready\n" * 5_000)
    tracemalloc.start()
    try:
        lines = sum(1 for _ in file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert lines == 5_000
    assert peak < 300_000


def test_findings_keep_the_first_lines() -> None:
    """Of all that is wrong the first lines are named and the rest are counted."""
    findings = Findings()
    findings.add(Wrong(line, "later") for line in range(100, 130))
    findings.add([Wrong(5, "first")], count=50)

    assert findings.count == 80
    assert [wrong.line for wrong in findings.first] == [5, *range(100, 99 + SHOWN)]
