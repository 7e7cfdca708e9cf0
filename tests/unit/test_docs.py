"""README.md and docs/ say what the code does: settings, statuses, answers, links, commands."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from dispatcher.cli import app
from dispatcher.domain import outcomes, reports
from dispatcher.domain.message import Status
from dispatcher.settings import Settings

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CONFIGURATION = ROOT / "docs/configuration.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]

# What stands instead of a default that is none or that depends on where the program runs.
WORDS_FOR_NONE = {"", "no default", "empty: any", "built in"}


def text(path: Path) -> str:
    """A document."""
    return path.read_text("utf-8")


def settings() -> dict[str, str]:
    """Each setting and its default, as one writes it; empty for none."""
    found = {}
    for name, field in Settings.model_fields.items():
        default = field.default
        plain = isinstance(default, str | int | float | Path)
        found["DATABASE_URL" if name == "database_url" else f"DISPATCHER_{name.upper()}"] = (
            str(default) if plain else ""
        )
    return found


def test_readme_lists_each_setting_with_its_default() -> None:
    """The table of settings is whole, and its defaults are those of the code."""
    rows = re.findall(
        r"^\| `((?:DISPATCHER|DATABASE)_\w+)` \|([^|]*)\|", text(README), re.MULTILINE
    )
    assert {name: default.strip(" `") for name, default in rows} == settings()


def test_configuration_explains_each_setting_with_its_default() -> None:
    """Each setting has a paragraph that begins with its default."""
    found = re.findall(
        r"^\*\*`((?:DISPATCHER|DATABASE)_\w+)`\*\* - (`[^`]+`(?: on a terminal[^.]*)?|[^.]+)\.",
        text(CONFIGURATION),
        re.MULTILINE,
    )
    told = dict(found)
    assert told.keys() == settings().keys()
    for name, default in settings().items():
        if default:
            assert told[name] == f"`{default}`", name
        else:
            assert told[name] in {*WORDS_FOR_NONE, "`console` on a terminal, else `json`"}, name


def test_readme_explains_each_status() -> None:
    """The table of statuses is whole and in their order."""
    section = text(README).partition("## The way of a message")[2].partition("## ")[0]
    rows = re.findall(r"^\| `([a-z]+)` \|", section, re.MULTILINE)
    assert rows == list(Status)


def test_configuration_has_each_answer() -> None:
    """The table of answers is the one that decides."""
    section = text(CONFIGURATION).partition("### The answer")[2].partition("### Delivery")[0]
    rows = re.findall(r"^\| (`[A-Z].*?) \|", section, re.MULTILINE)
    told = {word for row in rows for word in re.findall(r"`([A-Z_]+)`", row)}
    assert told == set(outcomes.ANSWERS)


def test_configuration_has_each_word() -> None:
    """The table of the provider's words is the one that decides."""
    section = text(CONFIGURATION).partition("These words are known")[2].partition("###")[0]
    rows = re.findall(r"^\| `([a-z]+)` \| ([A-Z, ]+) \|", section, re.MULTILINE)
    told = {word: status for status, words in rows for word in words.split(", ")}
    assert told == {word: status.value for word, status in reports.WORDS.items()}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    """Each link to a file or a heading of ours finds it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text(path).replace("\n", " ")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, heading = target.partition("#")
        found = (path.parent / name) if name else path
        assert found.exists(), target
        if heading:
            lines = [line for line in text(found).splitlines() if line.startswith("#")]
            slugs = {
                re.sub(r"[^\w -]", "", li.strip("# ").lower()).replace(" ", "-") for li in lines
            }
            assert heading in slugs, target


def commands() -> list[str]:
    """Each command line of ours that a document shows."""
    found = []
    for path in DOCUMENTS:
        for line in text(path).splitlines():
            match = re.match(
                r"^ {3,}(?:\S*/)?dispatcher(?:-\S+/bin/dispatcher)? (.+?)(?: +#.*)?$", line
            )
            if match:
                found.append(match[1])
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_each_command_exists(line: str) -> None:
    """A command that a document shows exists, with the options shown."""
    words = shlex.split(line)
    command = get_command(app)
    while words and hasattr(command, "get_command") and not words[0].startswith("-"):
        found = command.get_command(None, words[0])
        assert found is not None, words[0]
        command = found
        words = words[1:]
    known = {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
    options = {word for word in words if word.startswith("--")}
    assert options <= known | {"--help", "--version"}


def test_make_targets_exist() -> None:
    """A `make` target that a document shows is one."""
    targets = set(re.findall(r"^([a-z-]+):.*## ", text(ROOT / "Makefile"), re.MULTILINE))
    shown = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text(path), re.MULTILINE)
    }
    assert {"demo", "test", "check"} <= shown <= targets


def test_readme_lays_out_what_is_there() -> None:
    """Each module and directory of the package is in the layout, and nothing else."""
    section = text(README).partition("## How the code is laid out")[2].partition("##")[0]
    shown = set()
    for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        shown |= {
            name.removeprefix("dispatcher/").strip("/") for name in re.findall(r"`([^`]+)`", cell)
        }
    package = {
        path.name
        for path in (ROOT / "dispatcher").iterdir()
        if not path.name.startswith("_") and path.name != "py.typed"
    }
    assert package <= shown
    assert all((ROOT / name).exists() or (ROOT / "dispatcher" / name).exists() for name in shown)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_fit_a_terminal(path: Path) -> None:
    """Running text and commands fit 80 columns; tables and examples of logs need not."""
    for line in text(path).splitlines():
        if not line.startswith(("|", "{")) and "](" not in line:
            assert len(line) <= 80, line
