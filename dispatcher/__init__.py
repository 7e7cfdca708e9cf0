"""Sends the rows of a PostgreSQL outbox as SMS through SMSPAY."""
