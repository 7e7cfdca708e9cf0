"""Triggers that work whatever the search path and the rights of who writes the row."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# They would look for our tables and functions where the application looks for its own.
SEARCH_PATH = """
DO $$
BEGIN
    EXECUTE format(
        'ALTER FUNCTION dispatcher_wake() SECURITY DEFINER SET search_path = %I, pg_temp',
        current_schema());
    EXECUTE format(
        'ALTER FUNCTION dispatcher_check_service() SET search_path = %I, pg_temp',
        current_schema());
END
$$
"""


def upgrade() -> None:
    """Say where they find what is ours."""
    op.execute(SEARCH_PATH)
