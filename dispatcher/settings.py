"""Settings from the environment and a `.env` file, all checked at the start."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values
from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from dispatcher.domain.message import Status
from dispatcher.domain.reports import REPORTED, WORDS

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PREFIX: Final = "DISPATCHER_"


class SettingsError(Exception):
    """A setting is wrong; the text is one sentence that names it."""


def _networks(value: object) -> object:
    if isinstance(value, str):
        return tuple(
            ipaddress.ip_network(part.strip(), strict=False)
            for part in value.split(",")
            if part.strip()
        )
    return value


def _words(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        told = json.loads(value) if value.strip() else {}
    except json.JSONDecodeError:
        raise ValueError("it is not JSON") from None
    if not isinstance(told, dict):
        raise ValueError("it is not a JSON object")
    words: dict[str, Status] = {}
    for word, status in told.items():
        if not isinstance(status, str) or status not in set(REPORTED):
            raise ValueError("its values must be enroute, delivered or undeliverable")
        words[word.strip().upper()] = Status(status)
    return {**WORDS, **words}


class Settings(BaseSettings):
    """Everything that an operator can set. Times are in seconds."""

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
        allow_inf_nan=False,
        validate_default=False,  # a check of the region would load every numbering plan
    )

    database_url: str | None = Field(
        None, validation_alias=AliasChoices("DATABASE_URL", "database_url")
    )
    data_dir: Path = Path(".dispatcher")
    provider_url: str = "http://rcv.smspay.bg/users/send_bulk.php"
    concurrency: int = Field(100, ge=1, le=10_000)
    request_timeout: float = Field(15, gt=0, le=3600)
    keepalive: float = Field(2, gt=0, le=3600)
    poll_interval: float = Field(1, ge=0.01, le=3600)
    lease: float = Field(30, ge=0.5, le=3600)
    drain: float = Field(20, ge=0, le=3600)
    egress: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)
    ] = "default"
    ban_backoff: float = Field(60, gt=0, le=86_400)
    ban_backoff_max: float = Field(3600, gt=0, le=604_800)
    probe_interval: float = Field(600, gt=0, le=604_800)
    unknown_retry_after: float = Field(60, ge=0, le=604_800)
    prune_days: float | None = Field(None, ge=1, le=36_500)
    """Days after which finished messages are removed by a worker; None leaves it to `prune`."""
    region: str = "BG"
    http_host: str = Field("127.0.0.1", min_length=1)
    http_port: int = Field(8080, ge=0, le=65_535)
    dlr_token: str | None = Field(None, min_length=1)
    dlr_allow: Annotated[tuple[Network, ...], NoDecode, BeforeValidator(_networks)] = ()
    dlr_id_param: str = Field("sms_id", min_length=1)
    dlr_status_param: str = Field("status", min_length=1)
    dlr_status_map: Annotated[Mapping[str, Status], NoDecode, BeforeValidator(_words)] = WORDS
    log_format: Literal["json", "console"] = Field(
        default_factory=lambda: "console" if sys.stdout.isatty() else "json"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("database_url")
    @classmethod
    def _is_postgres(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("postgresql://", "postgres://")):
            raise ValueError("it must begin with postgresql://")
        if value is not None:
            hosts = value.partition("://")[2].partition("/")[0].partition("?")[0]
            for host in hosts.rpartition("@")[2].split(","):
                port = host.rpartition("]")[2].partition(":")[2]
                if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
                    raise ValueError("its port must be 1 to 65535")
        return value

    @field_validator("provider_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("it must be an http:// or https:// address")
        if "\\" in parts.netloc or ":" in unquote(parts.username or ""):
            raise ValueError("its user or host has a character that cannot be there")
        try:
            port = parts.port
        except ValueError:
            port = 0
        if port == 0:
            raise ValueError("its port must be 1 to 65535")
        try:
            parts.hostname.encode("idna")
            known = parts.hostname.isprintable() and not set(parts.hostname) & set(" \\")
        except UnicodeError:
            known = False
        if not known:
            raise ValueError("its host is none that can be looked up")
        return value

    @field_validator("region")
    @classmethod
    def _is_region(cls, value: str) -> str:
        import phonenumbers  # slow to load, and only the start needs it here

        if value not in phonenumbers.SUPPORTED_REGIONS:
            raise ValueError("it must be a country of two capitals, such as BG")
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_small_letters(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.ban_backoff_max < self.ban_backoff:
            raise ValueError(
                "DISPATCHER_BAN_BACKOFF_MAX is less than DISPATCHER_BAN_BACKOFF; raise it"
            )
        return self


def unknown() -> list[str]:
    """Names that look like a setting and are none, such as misspelt ones."""
    known = {f"{_PREFIX}{name}".upper() for name in Settings.model_fields}
    found = {name.upper() for name in (*os.environ, *dotenv_values(".env"))}
    return sorted(name for name in found - known if name.startswith(_PREFIX))


_PLAINLY: Final = {
    "int_parsing": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_parsing": "it must be a number",
    "finite_number": "it must be a number",
    "greater_than": "it must be more than {gt:g}",
    "greater_than_equal": "it must be at least {ge:g}",
    "less_than_equal": "it must be at most {le:g}",
    "string_too_short": "it must not be empty",
}
"""The library's kinds of error, in our words."""


def load(**given: Any) -> Settings:
    """Read and check the settings; `given` overrides the environment.

    Raises SettingsError with one sentence that names the wrong setting.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None
    except UnicodeDecodeError:
        raise SettingsError("The file .env is not UTF-8; save it as UTF-8.") from None
    except OSError as error:
        raise SettingsError(f"The file .env cannot be read ({error.strerror}); mend it.") from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    told = first["msg"].removeprefix("Value error, ").rstrip(".")
    if plainly := _PLAINLY.get(first["type"]):
        told = plainly.format(**first.get("ctx", {}))
    if not first["loc"]:
        return f"{told}."
    field = str(first["loc"][0])
    name = "DATABASE_URL" if field.lower() == "database_url" else _PREFIX + field.upper()
    return f"{name} is wrong: {told[0].lower()}{told[1:]}."
