"""Where tests keep PostgreSQL's files: in memory if it has room, for no test needs them after."""

import shutil
import tempfile
from pathlib import Path
from typing import Final

_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - each test makes a directory of its own in it
_ROOM: Final = 1024**3
"""Bytes that must be free in it; a container has 64 MB unless told otherwise."""


def directory(what: str) -> tempfile.TemporaryDirectory[str]:
    """A directory that is removed after use; `what` begins its name.

    Making a database writes 300 files, which takes a disk ten times as long.
    """
    memory = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _ROOM
    return tempfile.TemporaryDirectory(
        prefix=f"dispatcher-{what}-", dir=_MEMORY if memory else None
    )
