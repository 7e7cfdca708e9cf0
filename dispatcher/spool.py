"""Results on disk: what a worker knew when it had to stop and the database was away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import uuid4

import orjson
import structlog

from dispatcher.db import outbox, workers
from dispatcher.db.pool import Session
from dispatcher.domain.message import Status
from dispatcher.domain.outcomes import Outcome
from dispatcher.settings import SettingsError

T = TypeVar("T")

BATCH: Final = 500

log = structlog.stdlib.get_logger()


def prepare(data_dir: Path) -> None:
    """Make sure that results could be written. Raises SettingsError if not."""
    folder = data_dir / "spool"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{uuid4().hex}.part"
        probe.touch(mode=0o600)
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"DISPATCHER_DATA_DIR is wrong: {data_dir} cannot be written ({error.strerror}); "
            "set a directory that can."
        ) from None


def write(
    data_dir: Path,
    worker_id: int,
    entered: str,
    results: Sequence[outbox.Result],
    *,
    database: str,
) -> Path | None:
    """Write results durably, one JSON object a line; None if there are none. Raises OSError.

    `entered`: when the worker did, as `workers.entered` tells it; `database`: where, likewise.
    """
    if not results:
        return None
    folder = data_dir / "spool"
    folder.mkdir(parents=True, exist_ok=True)
    # In three parts, as it was before the database was in it: an older version can take it up.
    path = folder / f"{worker_id}-{entered}-{database}.{uuid4().hex}.jsonl"
    # Another worker that starts meanwhile must not take up half of it.
    unfinished = path.with_suffix(".part")
    with unfinished.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.writelines(orjson.dumps(_flat(result)) + b"\n" for result in results)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    _sync(folder)
    return path


async def take_up(data_dir: Path, session: Session) -> int:
    """Record what earlier runs left behind, then remove it; returns how many results were new.

    A file with a line that cannot be read is kept as `.torn`, and one of a worker of another
    database is left to that. Raises DatabaseLost; what was not recorded stays.
    """
    recorded = 0
    for path in sorted((data_dir / "spool").glob("*-*-*.jsonl")):
        if not await _is_of(session, path):
            log.warning("spool.foreign", file=path.name)
            continue
        try:
            results = list(_read(path))
            whole = len(results) == len(path.read_bytes().splitlines())
        except FileNotFoundError:
            continue  # another worker that starts now has taken it up
        for start in range(0, len(results), BATCH):
            recorded += len(await outbox.record(session, results[start : start + BATCH]))
        with suppress(FileNotFoundError):
            if whole:
                path.unlink()
            else:
                path.rename(path.with_suffix(".torn"))
        log.info("spool.taken_up", results=len(results), recorded=recorded)
    return recorded


async def _is_of(session: Session, path: Path) -> bool:
    """Whether a file belongs to the session's database."""
    worker_id, its_entry, rest = path.stem.split("-")
    entered = await workers.entered(session, int(worker_id))
    if entered is not None:
        return entered == its_entry
    # Workers are forgotten in time, and those of another database were never known.
    its_database, _, _ = rest.rpartition(".")
    return its_database in {"", await workers.database(session)}


def _flat(result: outbox.Result) -> dict[str, Any]:
    flat = asdict(result)
    flat.update(flat.pop("outcome")._asdict())
    del flat["signal"]  # its effect is for a moment that is over when this is read
    return flat


def _read(path: Path) -> Iterable[outbox.Result]:
    """The results in a file; a line that a crash tore, or that is no result, is told and left."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            flat = orjson.loads(line)
            yield outbox.Result(
                id=int(flat["id"]),
                claim_no=int(flat["claim_no"]),
                worker_id=int(flat["worker_id"]),
                service_id=int(flat["service_id"]),
                outcome=Outcome(
                    Status(flat["status"]),
                    reply=_optional(str, flat.get("reply")),
                    provider_id=_optional(str, flat.get("provider_id")),
                    error=_optional(str, flat.get("error")),
                    counts_attempt=bool(flat.get("counts_attempt", True)),
                    costs_quota=bool(flat.get("costs_quota", True)),
                ),
                retry_in=_optional(float, flat.get("retry_in")),
                failed=bool(flat.get("failed", False)),
                sent_ago=_optional(float, flat.get("sent_ago")),
                seconds=float(flat.get("seconds", 0.0)),
            )
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            log.error("spool.torn", file=path.name, line=number)


def _optional(kind: Callable[[Any], T], value: object) -> T | None:
    return None if value is None else kind(value)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
