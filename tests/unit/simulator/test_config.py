"""Configuration from JSON and from `key=value` text."""

import json
from pathlib import Path

import pytest

from dispatcher.simulator.config import Config, load, merge, pairs_of, service_of
from dispatcher.simulator.faults import Faults
from dispatcher.simulator.reports import Reports
from dispatcher.simulator.rules import Ban, Service


def test_merge_lays_changes_over_what_is_there() -> None:
    """What is named changes, what is not stays, and a new service is added."""
    base = Config(
        seed=1, services=(Service(42, user=7, day=5),), faults=Faults(drop=0.1), ban=Ban(after=3)
    )

    merged = merge(
        base,
        {
            "seed": None,
            "clock_offset": -90,
            "services": [
                {"id": 42, "day": None, "templates": ["a,b"], "allowed_ips": "127.0.0.1"},
                {"id": 43, "disabled": True},
            ],
            "faults": {"latency": [0.1, 0.2], "hang": 1e-3},
            "ban": {"refused": 50},
            "reports": {"url": "http://localhost/dlr", "enroute": 0.5, "final": "1:2"},
        },
    )

    assert merged == Config(
        clock_offset=-90.0,
        services=(
            Service(42, user=7, templates=("a,b",), allowed_ips=("127.0.0.1",)),
            Service(43, disabled=True),
        ),
        faults=Faults(latency=(0.1, 0.2), drop=0.1, hang=0.001),
        ban=Ban(refused=50, after=3),
        reports=Reports(url="http://localhost/dlr", enroute=(0.5, 0.5), final=(1.0, 2.0)),
    )


def test_service_from_text() -> None:
    """The short form of a service means the same as its JSON."""
    changes = service_of("42:day=1000, delay=0.05,user=7,disabled=no,week=none,timezone=UTC")

    assert merge(Config(), {"services": [changes]}).services == (
        Service(42, user=7, day=1000, delay=0.05, timezone="UTC"),
    )
    assert service_of("42") == {"id": 42}
    assert pairs_of("") == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ([], "the configuration must be a JSON object."),
        ({"prot": 1}, "the configuration has no setting 'prot', but host, port, seed, "),
        ({"port": 70000}, "port must be from 0 to 65535, but is 70000."),
        ({"port": True}, "the configuration: port cannot be True."),
        ({"port": 1.5}, "the configuration: port cannot be 1.5."),
        ({"log_size": -1}, "log_size must not be negative, but is -1."),
        ({"host": 1}, "the configuration: host cannot be 1."),
        ({"faults": {"drop": "much"}}, "faults: drop cannot be 'much'."),
        ({"faults": {"drop": True}}, "faults: drop cannot be True."),
        ({"faults": {"drop": float("nan")}}, "faults: drop cannot be nan."),
        ({"faults": {"latency": [1, 2, 3]}}, "faults: latency cannot be [1, 2, 3]."),
        ({"faults": None}, "faults must be a JSON object."),
        ({"services": {}}, "services must be a list such as "),
        ({"services": [{"day": 1}]}, "services must be a list such as "),
        ({"services": [{"id": "42"}]}, "services must be a list such as "),
        ({"services": [{"id": 42, "dya": 1}]}, "service 42 has no setting 'dya', but id, user, "),
        (
            {"services": [{"id": 42, "disabled": "maybe"}]},
            "service 42: disabled cannot be 'maybe'.",
        ),
        ({"services": [{"id": 42, "templates": [1]}]}, "service 42: templates cannot be [1]."),
        ({"services": [{"id": 42, "disabled": []}]}, "service 42: disabled cannot be []."),
    ],
)
def test_wrong_setting(changes: object, sentence: str) -> None:
    """A wrong setting is named in one sentence that says what is wrong with it."""
    with pytest.raises(ValueError, match=r"\.$") as caught:
        merge(Config(), changes)

    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("text", ["day=1000", "", "x:day=1"])
def test_service_without_its_number(text: str) -> None:
    """The short form of a service must begin with the number."""
    with pytest.raises(ValueError, match="must begin with the service's number"):
        service_of(text)


def test_pair_without_equals() -> None:
    """The short form is made of pairs."""
    with pytest.raises(ValueError, match="'day' must be written as key=value"):
        pairs_of("day")


def test_load(tmp_path: Path) -> None:
    """A file is read over the configuration given."""
    path = tmp_path / "simulator.json"
    path.write_text(json.dumps({"port": 8025, "services": [{"id": 42, "timezone": "UTC"}]}))

    loaded = load(path, Config(seed=3))

    assert loaded == Config(port=8025, seed=3, services=(Service(42, timezone="UTC"),))


def test_load_refuses(tmp_path: Path) -> None:
    """A file that is away or no JSON is named in one sentence."""
    path = tmp_path / "simulator.json"
    with pytest.raises(ValueError, match=r"simulator\.json cannot be read: No such file"):
        load(path, Config())

    path.write_text("{")
    with pytest.raises(ValueError, match=r"simulator\.json is no JSON: "):
        load(path, Config())
