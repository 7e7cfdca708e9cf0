"""Triggers that work whatever the search path and the rights of who writes the row."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# They would look for our tables and functions where the application looks for its own.
SEARCH_PATH = """
DO $$
DECLARE
    ours text;
BEGIN
    SELECT p.pronamespace::regnamespace INTO STRICT ours
    FROM pg_proc p
    WHERE p.oid = 'dispatcher_wake()'::regprocedure;
    EXECUTE format(
        'ALTER FUNCTION dispatcher_wake() SECURITY DEFINER SET search_path = %s, pg_temp', ours);
    EXECUTE format(
        'ALTER FUNCTION dispatcher_check_service() SET search_path = %s, pg_temp', ours);
END
$$
"""


def upgrade() -> None:
    """Say where they find what is ours."""
    op.execute(SEARCH_PATH)
