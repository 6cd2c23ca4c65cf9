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
