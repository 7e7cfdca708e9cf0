"""What can be wrong with a database that answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from dispatcher.db.pool import Session

# Tell the database's version, whether it can be written to, and its time.
_LOOK: Final = """
SELECT
    current_setting('server_version') AS version,
    pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean AS read_only,
    extract(epoch FROM clock_timestamp())::float8 AS time
"""

# Count the workers that are alive on a machine.
_WORKERS: Final = """
SELECT count(*) AS workers
FROM worker w
WHERE w.host = $1 AND w.lease_until > clock_timestamp()
"""


@dataclass(frozen=True, slots=True)
class Health:
    """How a database is."""

    version: str
    read_only: bool
    time: float
    """Its clock, in seconds since 1970."""
    workers_here: int


async def look(session: Session, host: str, *, schema: bool) -> Health:
    """How the database is; `schema`: whether there are tables to ask. Raises DatabaseLost."""
    workers = (await session.fetch(_WORKERS, host))[0]["workers"] if schema else 0
    row = (await session.fetch(_LOOK))[0]
    return Health(row["version"], row["read_only"], row["time"], workers)
