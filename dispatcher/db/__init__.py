"""The only room that talks to PostgreSQL: whole statements, each above the function that runs it."""
