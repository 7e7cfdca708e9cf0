"""The only room that talks to PostgreSQL: whole statements, each above what runs it."""
