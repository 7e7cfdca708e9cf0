"""Sends the rows of a PostgreSQL outbox as SMS through SMSPAY."""

from typing import Final

__version__: Final = "0.1.0"
