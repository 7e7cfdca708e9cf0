from datetime import timedelta
from pathlib import Path

import pytest

from dispatcher.commands.csv_file import SHOWN
from dispatcher.commands.enqueue import CHUNK
from tests.builders import NUMBER, SERVICE, TEXT, add_message, add_service
from tests.integration.commands.conftest import Command, rows
from tests.integration.peers import Connection, message

ONE = ("enqueue", "--service", SERVICE, "--msisdn", NUMBER, "--text", TEXT)


async def test_one_message(command: Command, connection: Connection) -> None:
    """One message is put into the outbox as an INSERT would, and its id is printed."""
    await add_service(connection)
    inserted = dict(await message(connection, await add_message(connection)))

    done = await command(*ONE)

    assert done.code == 0
    enqueued = dict(await message(connection, int(done.out)))
    different = {name for name in enqueued if enqueued[name] != inserted[name]}
    assert different == {"id", "send_after", "created_at", "status_at"}


async def test_one_message_with_everything(command: Command, connection: Connection) -> None:
    """Every column that a user may set has its option; times may count from now."""
    await add_service(connection)

    done = await command(
        *("enqueue", "--service", SERVICE, "--msisdn", "+359 88 123 4567", "--text", "Готово"),
        *("--priority", "-3", "--send-after", "2h", "--expires-at", "2099-01-01T00:00Z"),
        *("--dedup-key", "k", "--batch", "may", "--no-extended", "--json"),
    )

    assert done.json["enqueued"]
    row = await message(connection, done.json["id"])
    assert (row["msisdn"], row["text"], row["priority"]) == ("+359 88 123 4567", "Готово", -3)
    assert (row["dedup_key"], row["batch"], row["extended"]) == ("k", "may", False)
    assert (row["status"], row["recipient"]) == ("pending", None)
    assert row["expires_at"].isoformat() == "2099-01-01T00:00:00+00:00"
    # The command looks at the clock a moment before the row is written.
    assert timedelta(minutes=119) < row["send_after"] - row["created_at"] <= timedelta(hours=2)


async def test_doubled_key(command: Command, connection: Connection) -> None:
    """A key that is there is told with the id of its message, and nothing is written."""
    await add_service(connection)
    await add_service(connection, 43)
    there = await add_message(connection, dedup_key="k")

    done = await command(*ONE, "--dedup-key", "k")
    as_json = await command(*ONE, "--dedup-key", "k", "--json")
    elsewhere = await command(*ONE, "--dedup-key", "k", "--service", 43)

    assert (done.code, done.out) == (1, "")
    assert done.err == f"Message {there} has the dedup_key 'k'; nothing is enqueued.\n"
    assert (as_json.code, as_json.json) == (1, {"id": there, "enqueued": False})
    assert elsewhere.code == 0


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--service", 44], 1, "There is no service 44; add it with 'dispatcher service add'."),
        (
            ["--msisdn", "0888"],
            1,
            "Nothing is enqueued: the number is not one that can be dialled.",
        ),
        (["--text", ""], 1, "Nothing is enqueued: the text is empty."),
        (
            ["--text", "я" * 161],
            1,
            "Nothing is enqueued: the text has 161 characters, 160 are the most.",
        ),
        (
            ["--text", "Hello"],
            1,
            "Nothing is enqueued: the text matches none of the service's patterns.",
        ),
        (["--text", "a\udcff"], 2, "Nothing is enqueued: it is not UTF-8."),
        (
            ["--expires-at", "2020-01-01"],
            1,
            "Nothing is enqueued: it expires before it can be sent.",
        ),
        (
            ["--send-after", "soon"],
            2,
            "--send-after is wrong: it is no time such as 2030-12-31T18:00+02:00 or 2h.",
        ),
    ],
)
async def test_refused(
    command: Command, connection: Connection, options: list[object], code: int, sentence: str
) -> None:
    """What could never be sent is refused at once, in one sentence without number and text."""
    await add_service(connection, patterns=["Your invoice .*", "я+", "a.*", ""])

    done = await command(*ONE, *options)

    assert (done.code, done.out, done.err) == (code, "", sentence + "\n")
    assert await rows(connection, "SELECT FROM outbox") == []


@pytest.mark.parametrize("given", [[], ["--msisdn", NUMBER], ["--text", TEXT]])
async def test_too_little(command: Command, given: list[str]) -> None:
    """Without a file both a number and a text are needed."""
    done = await command("enqueue", "--service", SERVICE, *given)

    assert (done.code, done.err) == (2, "Give --msisdn and --text, or a file.\n")


async def test_file(command: Command, connection: Connection, settings: Path) -> None:
    """A file is written whole and in its order, after a preview and a count of characters."""
    await add_service(connection)
    count = CHUNK + 1234
    (settings / "people.csv").write_text(
        "msisdn,number,priority\n"
        + "".join(f"{int(NUMBER) + line},{line},{line % 3}\n" for line in range(count)),
    )

    done = await command(
        *("enqueue", "people.csv", "--service", SERVICE, "--batch", "may"),
        *("--text", "Invoice $number is due"),
    )

    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"line 2, to {NUMBER}, 16 characters: Invoice 0 is due",
        f"line 3, to {int(NUMBER) + 1}, 16 characters: Invoice 1 is due",
        f"line 4, to {int(NUMBER) + 2}, 16 characters: Invoice 2 is due",
        f"… and {count - 3} more",
        "The longest text has 19 characters of 160.",
        f"{count} messages enqueued, ids 1 to {count}.",
    ]
    assert await rows(
        connection,
        "SELECT msisdn, text, priority, batch, status FROM outbox ORDER BY id",
    ) == [
        (str(int(NUMBER) + line), f"Invoice {line} is due", line % 3, "may", "pending")
        for line in range(count)
    ]


async def test_file_as_json(command: Command, connection: Connection, settings: Path) -> None:
    """With --json the result is one document."""
    await add_service(connection)
    (settings / "people.csv").write_text(f"msisdn,name\n{NUMBER},Ana\n")

    shown = await command("enqueue", "people.csv", "--service", SERVICE, "--text", "Hi")
    done = await command("enqueue", "people.csv", "--service", SERVICE, "--text", "Hi", "--json")

    assert shown.out.splitlines()[-2:] == [
        "Columns not used: name.",
        "1 message enqueued, with id 1.",
    ]

    assert done.json == {
        "enqueued": 1,
        "first_id": 2,
        "last_id": 2,
        "longest_text": 2,
        "ignored_columns": ["name"],
    }


async def test_preview_cannot_move_the_cursor(
    command: Command, connection: Connection, settings: Path
) -> None:
    """A text with control characters is shown without them, in 80 columns, and kept as it is."""
    await add_service(connection)
    text = "\x1b[2Jline\n" + "x" * 150
    (settings / "people.csv").write_text(f'msisdn,text\n{NUMBER},"{text}"\n')

    done = await command("enqueue", "people.csv", "--service", SERVICE)

    assert "\x1b" not in done.out
    assert "�[2Jline�xxx" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert (await message(connection, 1))["text"] == text


async def test_wrong_lines(command: Command, connection: Connection, settings: Path) -> None:
    """Every wrong line is named with its reason, also what only the database knows."""
    await add_service(connection, patterns=["Hi.*"])
    there = await add_message(connection, dedup_key="old")
    (settings / "people.csv").write_text(
        "msisdn,text,dedup_key\n"
        f"{NUMBER},Hi,a\n"
        f"{NUMBER},Hello,b\n"
        f"{NUMBER},Hi,a\n"
        f"{NUMBER},Hi,old\n"
        f"nobody,Hi,c\n"
        f"{NUMBER},{'Hi' * 81},\n"
    )

    done = await command("enqueue", "people.csv", "--service", SERVICE)
    as_json = await command("enqueue", "people.csv", "--service", SERVICE, "--json")

    reasons = {
        3: "the text matches none of the service's patterns",
        4: "its dedup_key stands in line 2 already",
        5: f"message {there} has its dedup_key already",
        6: "the number is not one that can be dialled",
        7: "the text has 162 characters, 160 are the most",
    }
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines() == [
        *(f"line {line}: {reason}" for line, reason in reasons.items()),
        "1 text too long, the longest by 2 characters",
        "Nothing is enqueued: 5 lines are wrong in people.csv.",
    ]
    assert as_json.code == 1
    assert as_json.json == {
        "enqueued": 0,
        "wrong_lines": 5,
        "lines": [{"line": line, "reason": reason} for line, reason in reasons.items()],
        "longest_text": 162,
        "texts_too_long": 1,
    }
    assert await rows(connection, "SELECT id FROM outbox") == [(there,)]


async def test_many_wrong_lines(command: Command, connection: Connection, settings: Path) -> None:
    """The first wrong lines are named and all are counted, whoever found them."""
    await add_service(connection, patterns=["Hi"])
    lines = [f"{NUMBER},Hello", "nobody,Hi"] * 30
    (settings / "people.csv").write_text("\n".join(["msisdn,text", *lines]))

    done = await command("enqueue", "people.csv", "--service", SERVICE)

    *named, more, last = done.err.splitlines()
    assert [line.partition(":")[0] for line in named] == [f"line {n}" for n in range(2, 2 + SHOWN)]
    assert more == f"… and {60 - SHOWN} more"
    assert last == "Nothing is enqueued: 60 lines are wrong in people.csv."


async def test_one_wrong_line_at_the_end(
    command: Command, connection: Connection, settings: Path
) -> None:
    """One wrong line at the end of a long file keeps all of it out."""
    await add_service(connection)
    lines = [f"{NUMBER},Hi"] * (CHUNK + 10)
    (settings / "people.csv").write_text("\n".join(["msisdn,text", *lines, f"{NUMBER},"]))

    done = await command("enqueue", "people.csv", "--service", SERVICE)

    assert done.err.splitlines() == [
        f"line {CHUNK + 12}: the text is empty",
        "Nothing is enqueued: 1 line is wrong in people.csv.",
    ]
    assert await rows(connection, "SELECT FROM outbox") == []


@pytest.mark.parametrize(
    ("content", "options", "code", "sentence"),
    [
        (None, [], 1, "people.csv cannot be read (No such file or directory)."),
        ("msisdn,text\n", [], 1, "people.csv has no messages."),
        (
            "msisdn,text,sendafter\n",
            [],
            1,
            (
                "people.csv cannot be used: the column 'sendafter' is none of the table outbox; "
                "only a template (--text) takes other columns."
            ),
        ),
        (
            "msisdn,text\n",
            ["--text", "$nobody"],
            1,
            "people.csv cannot be used: it has no column 'nobody', which the template names.",
        ),
        (
            "msisdn,text\n",
            ["--text", "5 $"],
            2,
            "--text is wrong: a name must follow each '$'; write '$$' for a dollar sign.",
        ),
        (
            "msisdn,text\n",
            ["--msisdn", NUMBER],
            2,
            "A file brings its own numbers and keys: leave out --msisdn, --dedup-key.",
        ),
        (
            "msisdn,text\n",
            ["--service", 44],
            1,
            "There is no service 44; add it with 'dispatcher service add'.",
        ),
    ],
)
async def test_unusable_files(
    command: Command,
    connection: Connection,
    settings: Path,
    content: str | None,
    options: list[object],
    code: int,
    sentence: str,
) -> None:
    """A file that cannot be used at all is refused in one sentence."""
    await add_service(connection)
    if content is not None:
        (settings / "people.csv").write_text(content)

    done = await command("enqueue", "people.csv", "--service", SERVICE, *options)

    assert (done.code, done.out, done.err) == (code, "", sentence + "\n")
