"""The simulator's configuration, and how JSON and `key=value` text become it."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from dispatcher.simulator.faults import Faults
from dispatcher.simulator.reports import Reports
from dispatcher.simulator.rules import Ban, Service


@dataclass(frozen=True, slots=True)
class Config:
    """All there is to set up.

    `port` 0 takes a free one; `seed` None draws one; `clock_offset` is how many seconds the
    provider's wall clock, by which its days begin, is ahead of this machine's; `log_size` is how
    many requests the log of messages keeps.
    """

    host: str = "127.0.0.1"
    port: int = 0
    seed: int | None = None
    clock_offset: float = 0.0
    log_size: int = 1_000_000
    services: tuple[Service, ...] = ()
    ban: Ban = field(default_factory=Ban)
    faults: Faults = field(default_factory=Faults)
    reports: Reports = field(default_factory=Reports)

    def __post_init__(self) -> None:
        """Refuse a port that is none, and a log of less than nothing."""
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 to 65535, but is {self.port}.")
        if self.log_size < 0:
            raise ValueError(f"log_size must not be negative, but is {self.log_size}.")


@dataclass(frozen=True, slots=True)
class BanNow:
    """A ban by command: for so many seconds, of one address, or of all where `ip` is None."""

    seconds: float = 60.0
    ip: str | None = None


Settings = TypeVar("Settings", Config, Service, Ban, Faults, Reports, BanNow)


def load(path: Path, base: Config) -> Config:
    """Read a JSON file over `base`; raises ValueError with one sentence if it does not fit."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from None
    return merge(base, content)


def merge(base: Config, changes: object) -> Config:
    """Lay JSON's changes over a configuration; raises ValueError with one sentence."""
    changes = mapping(changes, "the configuration")
    groups: dict[str, Any] = {
        name: amend(getattr(base, name), changes[name], name)
        for name in ("ban", "faults", "reports")
        if name in changes
    }
    if "services" in changes:
        groups["services"] = _services(base.services, changes["services"])
    plain = {name: value for name, value in changes.items() if name not in groups}
    return replace(amend(base, plain, "the configuration"), **groups)


def _services(base: tuple[Service, ...], changes: object) -> tuple[Service, ...]:
    services = {service.id: service for service in base}
    for change in changes if isinstance(changes, list) else [None]:
        number = change.get("id") if isinstance(change, dict) else None
        if type(number) is not int:
            raise ValueError('services must be a list such as [{"id": 42, "day": 1000}].')
        services[number] = amend(
            services.get(number) or Service(number), change, f"service {number}"
        )
    return tuple(services.values())


def service_of(text: str) -> dict[str, object]:
    """A service's changes from `42:day=1000,delay=0.05`; raises ValueError with one sentence."""
    number, _, rest = text.partition(":")
    if not number.isdecimal():
        raise ValueError(f"{text!r} must begin with the service's number, as in 42:day=1000.")
    return {"id": int(number), **pairs_of(rest)}


def pairs_of(text: str) -> dict[str, str]:
    """`key=value` pairs, separated by commas; raises ValueError with one sentence."""
    pairs = {}
    for pair in filter(None, text.split(",")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{pair!r} must be written as key=value.")
        pairs[key.strip()] = value.strip()
    return pairs


def amend(base: Settings, changes: object, where: str) -> Settings:
    """Lay changes over a dataclass, each value converted to its field's type."""
    hints = get_type_hints(type(base))
    values = {}
    for name, value in mapping(changes, where).items():
        convert = _CONVERSIONS.get(hints.get(name))
        if convert is None:
            known = ", ".join(field.name for field in fields(base))
            raise ValueError(f"{where} has no setting {name!r}, but {known}.")
        try:
            values[name] = convert(value)
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {name} cannot be {value!r}.") from None
    return replace(base, **values)


def mapping(value: object, where: str) -> dict[str, Any]:
    """The value, if it is a JSON object; raises ValueError with one sentence if not."""
    if isinstance(value, dict):
        return value
    raise ValueError(f"{where} must be a JSON object.")


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not isfinite(number):
        raise ValueError
    return number


def _flag(value: Any) -> bool:
    flags = {True: True, False: False, "true": True, "yes": True, "false": False, "no": False}
    if value not in flags:
        raise ValueError
    return flags[value]


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _span(value: Any) -> tuple[float, float]:
    ends = value.split(":") if isinstance(value, str) else value
    if not isinstance(ends, list):
        ends = [ends]
    if not 1 <= len(ends) <= 2:
        raise ValueError
    return _number(ends[0]), _number(ends[-1])


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(_string, value if isinstance(value, list) else [value]))


def _or_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None or value == "none" else convert(value)


_CONVERSIONS: dict[object, Callable[[Any], Any]] = {
    int: _integer,
    float: _number,
    bool: _flag,
    str: _string,
    int | None: _or_none(_integer),
    str | None: _or_none(_string),
    tuple[float, float]: _span,
    tuple[str, ...]: _strings,
}
