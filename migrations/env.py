"""Alembic's entry: it only renders SQL; `dispatcher migrate` runs what it renders."""

from alembic import context

if not context.is_offline_mode():
    raise SystemExit("Run 'dispatcher migrate'; Alembic only renders the SQL here.")

# 'named' keeps percent signs in the SQL as they are.
context.configure(dialect_name="postgresql", dialect_opts={"paramstyle": "named"})
with context.begin_transaction():
    context.run_migrations()
