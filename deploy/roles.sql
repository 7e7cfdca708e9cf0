-- Roles with the least rights that do the work. Run it as the owner of the tables, and again after
-- each `dispatcher migrate`; it may be run any number of times:
--
--     psql "$DATABASE_URL" -f deploy/roles.sql
--
-- The roles cannot log in. Grant them to the users that can:
--
--     CREATE ROLE shop LOGIN PASSWORD '...' IN ROLE dispatcher_producer;
--
-- dispatcher_producer  inserts messages, and cancels those that still wait
-- dispatcher_worker    `dispatcher run`
-- dispatcher_reader    `dispatcher status`, `why` and `export`, and dashboards; it sees texts
--
-- All else is for the owner: migrations, services, `enqueue`, `retry`, `resolve` and `prune`.

BEGIN;

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['dispatcher_producer', 'dispatcher_worker', 'dispatcher_reader'] LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I NOLOGIN', name);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN
            NULL; -- roles belong to the whole server: another database may have brought it
        END;
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', current_schema(), name);
    END LOOP;
END
$$;

REVOKE ALL
ON alembic_version, service, outbox, attempt, delivery_report, quota_usage, pace, egress,
    egress_service, worker
FROM dispatcher_producer, dispatcher_worker, dispatcher_reader;

-- Producer ---------------------------------------------------------------------------------------

GRANT INSERT
    (service_id, msisdn, text, extended, priority, send_after, expires_at, dedup_key, batch)
ON outbox TO dispatcher_producer;

-- To name what is to be cancelled, for RETURNING id, and for ON CONFLICT (service_id, dedup_key).
GRANT SELECT (id, service_id, dedup_key, batch, status) ON outbox TO dispatcher_producer;

GRANT UPDATE (status) ON outbox TO dispatcher_producer;

-- Who may write the status and nothing else may only cancel what waits. The worker always writes
-- more than the status, so its updates are past this by one comparison.
CREATE OR REPLACE FUNCTION dispatcher_only_cancel() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    IF NOT has_column_privilege(TG_RELID, 'claim_no', 'UPDATE') THEN
        RAISE EXCEPTION USING
            ERRCODE = 'insufficient_privilege',
            MESSAGE = format('Message %s is %s and may not become %s.',
                OLD.id, OLD.status, NEW.status),
            HINT = 'Only a pending message may be changed, and only to cancelled.';
    END IF;
    RETURN NEW;
END
$$;

-- By its name it comes before outbox_status_at, which writes status_at for who does not.
CREATE OR REPLACE TRIGGER outbox_only_cancel BEFORE UPDATE OF status ON outbox
FOR EACH ROW
WHEN (
    NEW.status_at = OLD.status_at
    AND NOT (OLD.status = 'pending' AND NEW.status = 'cancelled')
)
EXECUTE FUNCTION dispatcher_only_cancel();

-- Worker -----------------------------------------------------------------------------------------

GRANT SELECT ON alembic_version TO dispatcher_worker;

-- Only where DISPATCHER_PRUNE_DAYS is set does a worker remove messages; it then needs this too:
-- GRANT DELETE ON outbox, attempt, delivery_report, quota_usage TO dispatcher_worker;

GRANT SELECT, UPDATE (blocked_until, blocked_reason) ON service TO dispatcher_worker;

-- It never changes what a user wrote.
GRANT SELECT,
    UPDATE (
        status, status_at, retry_at, attempts, reply, provider_id, error, recipient, claim_no,
        worker_id, claimed_at, accepted_at, failures, doubts
    )
ON outbox TO dispatcher_worker;

GRANT SELECT, INSERT ON attempt TO dispatcher_worker;

GRANT SELECT, INSERT, UPDATE
ON quota_usage, pace, egress, egress_service, delivery_report TO dispatcher_worker;

GRANT SELECT, INSERT, UPDATE, DELETE ON worker TO dispatcher_worker;

-- Reader -----------------------------------------------------------------------------------------

GRANT SELECT
ON alembic_version, service, outbox, attempt, delivery_report, quota_usage, pace, egress,
    egress_service, worker
TO dispatcher_reader;

COMMIT;
