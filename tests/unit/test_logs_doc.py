"""docs/logs.md and the code tell the same: every event, its level, its fields."""

import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dispatcher"
LEVELS = {"debug", "info", "warning", "error"}

# What the log makes of an exception, so that its text is never seen.
EXCEPTION = {"exc_info": {"exception", "at"}}


@dataclass
class Event:
    """An event: its levels, its fields in each place that tells it, and those that may be there."""

    levels: set[str] = field(default_factory=set)
    fields: list[set[str]] = field(default_factory=list)
    optional: set[str] = field(default_factory=set)


class _Module:
    """One module's log calls, with what their arguments can be."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self.tree = ast.parse(path.read_text())

    def calls(self) -> Iterator[tuple[set[str], str, set[str], set[str]]]:
        """Events, level, fields and optional fields of each call."""
        for function in ast.walk(self.tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in _own(function):
                if isinstance(node, ast.Call) and _is_log(node):
                    assert isinstance(node.func, ast.Attribute)
                    names = self._events(node.args[0], function)
                    yield names, node.func.attr, *self._fields(node, function)

    def _events(self, value: ast.expr, function: ast.AST) -> set[str]:
        match value:
            case ast.Constant(value=str(name)):
                return {name}
            case ast.Subscript(value=ast.Name(id=table)):
                return self._values(table)
            case ast.Name(id=parameter):
                return self._passed(parameter, function)
        raise AssertionError(f"{self.name}: which event is {ast.unparse(value)}?")

    def _values(self, table: str) -> set[str]:
        """The values of a table of events, wherever it is written."""
        for path in sorted(PACKAGE.glob("*.py")):
            for node in ast.parse(path.read_text()).body:
                if (
                    isinstance(node, ast.AnnAssign)
                    and isinstance(node.target, ast.Name)
                    and node.target.id == table
                    and isinstance(node.value, ast.Dict)
                ):
                    return {ast.literal_eval(value) for value in node.value.values}
        raise AssertionError(f"{self.name}: where is {table}?")

    def _passed(self, parameter: str, function: ast.AST) -> set[str]:
        """What is passed for a parameter, in this module."""
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        names = [argument.arg for argument in function.args.args if argument.arg != "self"]
        place = names.index(parameter)
        found = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{function.name}":
                argument = node.args[place]
                assert isinstance(argument, ast.Constant), f"{self.name}: {ast.unparse(node)}"
                found.add(str(argument.value))
        assert found, f"{self.name}: nobody calls {function.name}"
        return found

    def _fields(self, call: ast.Call, function: ast.AST) -> tuple[set[str], set[str]]:
        fields: set[str] = set()
        optional: set[str] = set()
        for keyword in call.keywords:
            if keyword.arg is not None:
                fields |= EXCEPTION.get(keyword.arg, {keyword.arg})
            elif isinstance(keyword.value, ast.Name):
                built = self._built(keyword.value.id, function)
                fields |= built[0]
                optional |= built[1]
            else:
                fields |= self._returned(keyword.value)
        return fields, optional

    def _returned(self, call: ast.expr) -> set[str]:
        """The keys of a mapping that a function of the module returns."""
        assert isinstance(call, ast.Call), f"{self.name}: what is {ast.unparse(call)}?"
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef) and node.name == ast.unparse(call.func):
                returned = [n.value for n in ast.walk(node) if isinstance(n, ast.Return)]
                return {key for mapping in returned for key in _keys(mapping)}
        raise AssertionError(f"{self.name}: where is {ast.unparse(call.func)}?")

    def _built(self, variable: str, function: ast.AST) -> tuple[set[str], set[str]]:
        """The keys that a mapping begins with, and those that are put into it afterwards."""
        first: set[str] = set()
        later: set[str] = set()
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=mapping) if name == variable:
                    first |= _keys(mapping)
                case ast.AnnAssign(target=ast.Name(id=name), value=mapping) if name == variable:
                    first |= _keys(mapping)
                case ast.Assign(
                    targets=[ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=key))]
                ) if name == variable:
                    later.add(str(key))
        assert first, f"{self.name}: what is in {variable}?"
        return first, later


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """What is in a function and in no function inside it."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield child
        yield from _own(child)


def _is_log(call: ast.Call) -> bool:
    return (
        isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "log"
        and call.func.attr in {*LEVELS, "exception", "critical", "log"}
    )


def _keys(value: ast.expr | None) -> set[str]:
    assert isinstance(value, ast.Dict)
    return {str(ast.literal_eval(key)) for key in value.keys if key is not None}


def told() -> dict[str, Event]:
    """Every event that the code tells."""
    found: dict[str, Event] = defaultdict(Event)
    for path in sorted(PACKAGE.rglob("*.py")):
        if "simulator" in path.parts:
            continue
        for names, level, fields, optional in _Module(path).calls():
            for name in names:
                found[name].levels.add(level)
                found[name].fields.append(fields)
                found[name].optional |= optional
    return dict(found)


@dataclass
class Section:
    """An event as the document tells it."""

    level: str
    fields: set[str]
    example: dict[str, Any]


def documented() -> dict[str, Section]:
    """Every event of the document."""
    found = {}
    text = (ROOT / "docs/logs.md").read_text()
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        title = re.match(r"`([a-z_.]+)`\n\nLevel: ([a-z]+)\. Fields: ([^.]+)\.\n", section)
        example = re.search(r"```json\n(\{.*\})\n```", section)
        assert title, section[:80]
        assert example, section[:80]
        assert title[1] not in found
        fields = set(re.findall(r"`(\w+)`", title[3]))
        found[title[1]] = Section(title[2], fields, json.loads(example[1]))
    return found


TOLD, DOCUMENTED = told(), documented()


def test_every_event_is_there() -> None:
    """The document has each event that the code tells, and no other."""
    assert len(TOLD) > 30
    assert sorted(DOCUMENTED) == sorted(TOLD)


def test_every_field_is_there() -> None:
    """A field that an event has only sometimes is told of at least one event."""
    optional = {name for event in TOLD.values() for name in event.optional}
    assert optional <= {name for section in DOCUMENTED.values() for name in section.fields}


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_event(name: str) -> None:
    """An event has the level and the fields that the code gives it, and an example that fits."""
    event, section = TOLD[name], DOCUMENTED[name]
    assert event.levels == {section.level}
    always = set().union(*event.fields)
    assert always <= section.fields <= always | event.optional
    example = section.example
    assert (example.pop("event"), example.pop("level")) == (name, section.level)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", example.pop("timestamp"))
    assert example.keys() - event.optional in event.fields
    assert example.keys() <= section.fields
    assert re.fullmatch(r"\d{5}\*\*\*\d{3,4}|none", example.get("msisdn", "none"))
