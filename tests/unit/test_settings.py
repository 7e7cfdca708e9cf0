from __future__ import annotations

import ipaddress
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from dispatcher.domain.message import Status
from dispatcher.domain.reports import WORDS
from dispatcher.settings import Settings, SettingsError, load, unknown


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder without a `.env`, and an environment without a setting."""
    for name in list(os.environ):
        if name == "DATABASE_URL" or name.startswith("DISPATCHER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


DEFAULTS: dict[str, Any] = {
    "database_url": None,
    "data_dir": Path(".dispatcher"),
    "provider_url": "http://rcv.smspay.bg/users/send_bulk.php",
    "concurrency": 100,
    "request_timeout": 15,
    "keepalive": 2,
    "poll_interval": 1,
    "lease": 30,
    "drain": 20,
    "egress": "default",
    "ban_backoff": 60,
    "ban_backoff_max": 3600,
    "probe_interval": 600,
    "unknown_retry_after": 60,
    "prune_days": None,
    "region": "BG",
    "http_host": "127.0.0.1",
    "http_port": 8080,
    "dlr_token": None,
    "dlr_allow": (),
    "dlr_id_param": "sms_id",
    "dlr_status_param": "status",
    "dlr_status_map": WORDS,
    "log_format": "json",
    "log_level": "info",
}

RIGHT: list[tuple[str, str, Any]] = [
    ("DATABASE_URL", "postgresql://me@db/sms", "postgresql://me@db/sms"),
    ("DATABASE_URL", "postgres://me@db/sms", "postgres://me@db/sms"),
    ("DISPATCHER_DATA_DIR", "/var/lib/dispatcher", Path("/var/lib/dispatcher")),
    ("DISPATCHER_PROVIDER_URL", "https://[::1]:8025/x?y=1", "https://[::1]:8025/x?y=1"),
    ("DISPATCHER_PROVIDER_URL", "http://фирма.eu/", "http://фирма.eu/"),
    ("DISPATCHER_CONCURRENCY", "1", 1),
    ("DISPATCHER_CONCURRENCY", "10000", 10_000),
    ("DISPATCHER_REQUEST_TIMEOUT", "0.5", 0.5),
    ("DISPATCHER_KEEPALIVE", "0.1", 0.1),
    ("DISPATCHER_POLL_INTERVAL", "0.01", 0.01),
    ("DISPATCHER_LEASE", "0.5", 0.5),
    ("DISPATCHER_DRAIN", "0", 0),
    ("DISPATCHER_EGRESS", "sofia-1", "sofia-1"),
    ("DISPATCHER_BAN_BACKOFF", "1", 1),
    ("DISPATCHER_BAN_BACKOFF_MAX", "60", 60),
    ("DISPATCHER_PROBE_INTERVAL", "1.5", 1.5),
    ("DISPATCHER_UNKNOWN_RETRY_AFTER", "0", 0),
    ("DISPATCHER_PRUNE_DAYS", "90", 90),
    ("DISPATCHER_REGION", "GB", "GB"),
    ("DISPATCHER_HTTP_HOST", "0.0.0.0", "0.0.0.0"),  # noqa: S104 - nothing listens here
    ("DISPATCHER_HTTP_PORT", "0", 0),
    ("DISPATCHER_DLR_TOKEN", "s3cret", "s3cret"),
    ("DISPATCHER_DLR_ALLOW", "10.0.0.1", (ipaddress.ip_network("10.0.0.1/32"),)),
    (
        "DISPATCHER_DLR_ALLOW",
        " 10.0.0.1/8, 2001:db8::/32 ,",
        (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("2001:db8::/32")),
    ),
    ("DISPATCHER_DLR_ID_PARAM", "message", "message"),
    ("DISPATCHER_DLR_STATUS_PARAM", "state", "state"),
    (
        "DISPATCHER_DLR_STATUS_MAP",
        '{" seen ": "delivered", "SENT": "undeliverable"}',
        {**WORDS, "SEEN": Status.DELIVERED, "SENT": Status.UNDELIVERABLE},
    ),
    ("DISPATCHER_LOG_FORMAT", "console", "console"),
    ("DISPATCHER_LOG_LEVEL", "WARNING", "warning"),
]

WRONG = [
    ("DATABASE_URL", "mysql://me@db/sms"),
    ("DATABASE_URL", "me@db/sms"),
    ("DISPATCHER_PROVIDER_URL", "rcv.smspay.bg"),
    ("DISPATCHER_PROVIDER_URL", "ftp://rcv.smspay.bg/"),
    ("DISPATCHER_PROVIDER_URL", "http://"),
    ("DISPATCHER_PROVIDER_URL", "http://rcv.smspay.bg:0/"),
    ("DISPATCHER_PROVIDER_URL", "http://rcv.smspay.bg:99999/"),
    ("DISPATCHER_PROVIDER_URL", "http://rcv.smspay.bg:x/"),
    ("DISPATCHER_PROVIDER_URL", "http://[::1/"),
    ("DISPATCHER_PROVIDER_URL", "http://a..b/"),
    ("DISPATCHER_PROVIDER_URL", "http://a b/"),
    ("DISPATCHER_PROVIDER_URL", "http://a\\b/"),
    ("DISPATCHER_PROVIDER_URL", "http://a:80\\@b/"),
    ("DISPATCHER_PROVIDER_URL", "http://a%3Ab:c@d/"),
    ("DISPATCHER_CONCURRENCY", "0"),
    ("DISPATCHER_CONCURRENCY", "10001"),
    ("DISPATCHER_CONCURRENCY", "1.5"),
    ("DISPATCHER_CONCURRENCY", "many"),
    ("DISPATCHER_REQUEST_TIMEOUT", "0"),
    ("DISPATCHER_REQUEST_TIMEOUT", "nan"),
    ("DISPATCHER_REQUEST_TIMEOUT", "inf"),
    ("DISPATCHER_KEEPALIVE", "-1"),
    ("DISPATCHER_POLL_INTERVAL", "0"),
    ("DISPATCHER_LEASE", "0.1"),
    ("DISPATCHER_LEASE", "1d"),
    ("DISPATCHER_DRAIN", "-1"),
    ("DISPATCHER_DRAIN", "nan"),
    ("DISPATCHER_EGRESS", "x" * 201),
    ("DISPATCHER_EGRESS", "  "),
    ("DISPATCHER_BAN_BACKOFF", "0"),
    ("DISPATCHER_BAN_BACKOFF", "nan"),
    ("DISPATCHER_BAN_BACKOFF_MAX", "59"),
    ("DISPATCHER_PROBE_INTERVAL", "0"),
    ("DISPATCHER_UNKNOWN_RETRY_AFTER", "-1"),
    ("DISPATCHER_UNKNOWN_RETRY_AFTER", "nan"),
    ("DISPATCHER_PRUNE_DAYS", "0"),
    ("DISPATCHER_REGION", "Bulgaria"),
    ("DISPATCHER_REGION", "bg"),
    ("DISPATCHER_REGION", "XX"),
    ("DISPATCHER_HTTP_PORT", "-1"),
    ("DISPATCHER_HTTP_PORT", "65536"),
    ("DISPATCHER_HTTP_PORT", "http"),
    ("DISPATCHER_DLR_ALLOW", "10.0.0.0/40"),
    ("DISPATCHER_DLR_ALLOW", "rcv.smspay.bg"),
    ("DISPATCHER_DLR_STATUS_MAP", "DELIVRD=delivered"),
    ("DISPATCHER_DLR_STATUS_MAP", "[]"),
    ("DISPATCHER_DLR_STATUS_MAP", '{"SEEN": "seen"}'),
    ("DISPATCHER_DLR_STATUS_MAP", '{"SEEN": "accepted"}'),
    ("DISPATCHER_DLR_STATUS_MAP", '{"SEEN": ["delivered"]}'),
    ("DISPATCHER_DLR_STATUS_MAP", '{"SEEN": null}'),
    ("DISPATCHER_LOG_FORMAT", "xml"),
    ("DISPATCHER_LOG_LEVEL", "loud"),
]


def field(name: str) -> str:
    """The attribute that holds a setting."""
    return name.lower().removeprefix("dispatcher_")


def test_defaults() -> None:
    """Without an environment every setting has its documented default."""
    assert load().model_dump() == DEFAULTS


def test_every_setting_is_here() -> None:
    """Each setting is tried right, and wrong where a value can be wrong."""
    names = set(Settings.model_fields)
    free = {"data_dir", "http_host", "dlr_token", "dlr_id_param", "dlr_status_param"}

    assert {field(name) for name, _, _ in RIGHT} == names
    assert {field(name) for name, _ in WRONG} == names - free


@pytest.mark.parametrize(("name", "value", "meant"), RIGHT)
def test_right(monkeypatch: pytest.MonkeyPatch, name: str, value: str, meant: object) -> None:
    """A good value in the environment is taken, and nothing else changes."""
    monkeypatch.setenv(name, value)

    assert load().model_dump() == {**DEFAULTS, field(name): meant}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("DISPATCHER_CONCURRENCY", "many", "it must be a whole number"),
        ("DISPATCHER_CONCURRENCY", "0", "it must be at least 1"),
        ("DISPATCHER_HTTP_PORT", "65536", "it must be at most 65535"),
        ("DISPATCHER_KEEPALIVE", "0", "it must be more than 0"),
        ("DISPATCHER_LEASE", "nan", "it must be a number"),
        ("DISPATCHER_LEASE", "1d", "it must be a number"),
        ("DISPATCHER_PROVIDER_URL", "http://a:x/", "its port must be 1 to 65535"),
    ],
)
def test_wrong_in_plain_words(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    """What is wrong with a value is told in words of ours, not of a library."""
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError, match=f"^{name} is wrong: {sentence}\\.$"):
        load()


def test_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names that look like a setting and are none are found, wherever they are written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("DISPATCHER_EGRES=one\nDISPATCHER_LEASE=5\nOTHER=1\n")
    monkeypatch.setenv("dispatcher_concurency", "5")
    monkeypatch.setenv("DISPATCHER_DRAIN", "5")

    assert unknown() == ["DISPATCHER_CONCURENCY", "DISPATCHER_EGRES"]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """A bad value is refused with one sentence that begins with the setting's name."""
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        load()

    sentence = str(caught.value)
    assert sentence.startswith(f"{name} is ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert ". " not in sentence
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", sorted({name for name, _, _ in RIGHT}))
def test_empty_is_unset(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """An empty value means the default, as in a file that lists every setting."""
    monkeypatch.setenv(name, "")

    assert load().model_dump() == DEFAULTS


def test_value_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong address of the database does not put its password on the terminal."""
    monkeypatch.setenv("DATABASE_URL", "mysql://me:hunter2@db/sms")

    with pytest.raises(SettingsError) as caught:
        load()

    assert "hunter2" not in str(caught.value)


def test_file(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `.env` is read, what the environment says goes before it, and strangers are ignored."""
    (bare / ".env").write_text(
        "# ours\nDISPATCHER_LEASE=7\nDISPATCHER_EGRESS='Пловдив'\nOTHER=1\nDISPATCHER_OTHER=1\n",
        "utf-8",
    )
    monkeypatch.setenv("DISPATCHER_LEASE", "8")

    settings = load()

    assert (settings.lease, settings.egress) == (8, "Пловдив")


def test_wrong_in_file(bare: Path) -> None:
    """A bad value in a `.env` is refused like one in the environment."""
    (bare / ".env").write_text("DISPATCHER_LEASE=soon\n")

    with pytest.raises(SettingsError, match=r"^DISPATCHER_LEASE is wrong: .*\.$"):
        load()


def test_file_in_another_encoding(bare: Path) -> None:
    """A `.env` that is not UTF-8 is refused with a sentence, like a wrong setting."""
    (bare / ".env").write_bytes("DISPATCHER_EGRESS=Пловдив\n".encode("cp1251"))

    with pytest.raises(SettingsError, match=r"^The file \.env is not UTF-8; save it as UTF-8\.$"):
        load()


@pytest.mark.skipif(sys.platform != "linux", reason="takes a file that root cannot read either")
def test_file_that_cannot_be_read(bare: Path) -> None:
    """A `.env` that the system does not give is refused with a sentence, like a wrong setting."""
    (bare / ".env").symlink_to("/proc/self/mem")

    with pytest.raises(SettingsError, match=r"^The file \.env cannot be read \(.+\); mend it\.$"):
        load()


def test_given_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command gives by itself goes before the environment."""
    monkeypatch.setenv("DISPATCHER_LEASE", "soon")

    assert load(lease=9).lease == 9


def test_terminal_gets_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the logs are for people, unless set otherwise."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert load().log_format == "console"

    monkeypatch.setenv("DISPATCHER_LOG_FORMAT", "json")
    assert load().log_format == "json"


def test_status_map_of_every_state() -> None:
    """Each state that a report can tell may be a meaning in the map, case of the word ignored."""
    told = {"a": "enroute", "B": "delivered", "c ": "undeliverable"}

    settings = load(dlr_status_map=json.dumps(told))

    assert settings.dlr_status_map == {
        **WORDS,
        "A": Status.ENROUTE,
        "B": Status.DELIVERED,
        "C": Status.UNDELIVERABLE,
    }
