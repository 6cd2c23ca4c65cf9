-- compatible-with: previous
-- Resources leased, outcomes learnt, nobody starved. Each section says whose words it holds.

-- Feedback: what failed whom, whose word counts how much, and which broker has heard of it.

-- A store is not offered to a client that it failed (Client.name: principal, instance and address), until then.
CREATE TABLE failures (
    client   text NOT NULL,
    store_id integer NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
    until    timestamptz NOT NULL,
    PRIMARY KEY (client, store_id)
);
CREATE INDEX failures_by_end ON failures (until);
CREATE TRIGGER changed AFTER INSERT OR UPDATE ON failures FOR EACH ROW EXECUTE FUNCTION record_change('failure', 'client');

-- One row per running broker process: the snapshot with which it last read changes, everything in which it has taken over.
CREATE TABLE brokers (
    id   uuid PRIMARY KEY,
    seen pg_snapshot NOT NULL,
    at   timestamptz NOT NULL
) WITH (fillfactor = 20);

-- What one voice (principal and address) has said of a store: how much, decaying as paths do, and whether its last word was a failure.
CREATE TABLE voices (
    voice       text NOT NULL,
    store_id    integer NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
    direction   text NOT NULL CHECK (direction IN ('read', 'write')),
    network     text NOT NULL,
    project     text NOT NULL,
    weight      double precision NOT NULL,
    trouble     double precision NOT NULL,
    heard_at    timestamptz NOT NULL,
    reported_at timestamptz,
    PRIMARY KEY (voice, store_id, direction)
) WITH (fillfactor = 70);
CREATE INDEX voices_lately ON voices (store_id, direction, heard_at);
CREATE INDEX voices_by_age ON voices (heard_at);
CREATE INDEX voices_in_trouble ON voices (store_id, direction, heard_at) WHERE trouble > 0;

-- How far a job has come that looks once at everything in order of time.
CREATE TABLE watermarks (
    name text PRIMARY KEY,
    at   timestamptz NOT NULL
);
INSERT INTO watermarks VALUES ('expired', now()), ('committed', now());
CREATE INDEX tickets_by_end ON tickets USING brin (expires_at) WITH (autosummarize = on);

-- When the client first said that everything is there; NULL for uploads that were committed by the code before this step.
ALTER TABLE uploads ADD COLUMN sent_at timestamptz;

-- Why the ticket's places were chosen, beyond what is in them; NULL when there is nothing to tell.
ALTER TABLE tickets ADD COLUMN why jsonb;

-- Admission (broker/catalog/leases.py, contention.py, quotas.py).

-- What a lease is held for, and when its transfer is expected to end: expires_at is later by a margin. A counted lease is in usage.
ALTER TABLE leases ADD COLUMN project text NOT NULL DEFAULT '';
ALTER TABLE leases ADD COLUMN priority double precision NOT NULL DEFAULT 1;
ALTER TABLE leases ADD COLUMN bytes bigint NOT NULL DEFAULT 0;
ALTER TABLE leases ADD COLUMN counted boolean NOT NULL DEFAULT false;
ALTER TABLE leases ADD COLUMN expected_at timestamptz;
CREATE INDEX leases_counted ON leases (project) WHERE counted;

-- How long leases lasted lately: sums over those that were given back, each one a twentieth less at the next.
ALTER TABLE slots ADD COLUMN ended double precision NOT NULL DEFAULT 0;
ALTER TABLE slots ADD COLUMN lasted_seconds double precision NOT NULL DEFAULT 0;
ALTER TABLE slots ADD COLUMN expected_seconds double precision NOT NULL DEFAULT 0;

-- Requests that wait for a slot; their id is that of the ticket to be. They count while their broker is alive (desks.seen_at).
CREATE TABLE waits (
    id         uuid PRIMARY KEY,
    desk       uuid NOT NULL,
    project    text NOT NULL,
    priority   double precision NOT NULL,
    weight     double precision NOT NULL CHECK (weight > 0),
    max_leases integer,
    max_bytes  bigint,
    direction  text NOT NULL,
    store_ids  integer[] NOT NULL,
    bytes      bigint NOT NULL,
    asked_at   timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

-- Brokers at which somebody waits; those that died are swept away with their waits.
CREATE TABLE desks (
    id      uuid PRIMARY KEY,
    seen_at timestamptz NOT NULL
) WITH (fillfactor = 20);

-- What administrators allow a project. NULL: as the configuration says.
CREATE TABLE quotas (
    project    text PRIMARY KEY,
    max_leases integer CHECK (max_leases >= 0),
    max_bytes  bigint CHECK (max_bytes >= 0),
    weight     double precision CHECK (weight > 0)
);
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON quotas FOR EACH ROW EXECUTE FUNCTION record_change('quota', 'project');

-- What a project with limits holds: its counted leases, kept by triggers, so that code of the version before counts right too.
CREATE TABLE usage (
    project text PRIMARY KEY,
    leases  integer NOT NULL DEFAULT 0,
    bytes   bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

CREATE FUNCTION count_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO usage (project, leases, bytes) VALUES (NEW.project, 1, NEW.bytes)
            ON CONFLICT (project) DO UPDATE SET leases = usage.leases + 1, bytes = usage.bytes + NEW.bytes;
    ELSE
        UPDATE usage SET leases = leases - 1, bytes = bytes - OLD.bytes WHERE project = OLD.project;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER used AFTER INSERT ON leases FOR EACH ROW WHEN (NEW.counted) EXECUTE FUNCTION count_usage();
CREATE TRIGGER unused AFTER DELETE ON leases FOR EACH ROW WHEN (OLD.counted) EXECUTE FUNCTION count_usage();

-- Adaptive slots: where the broker looks for the number that moves the most, where its search stands, and since when. NULL: it does not.
ALTER TABLE slots ADD COLUMN adapt_min integer CHECK (adapt_min > 0);
ALTER TABLE slots ADD COLUMN adapt_max integer CHECK (adapt_max >= adapt_min);
ALTER TABLE slots ADD COLUMN search jsonb;
ALTER TABLE slots ADD COLUMN searched_at timestamptz;
