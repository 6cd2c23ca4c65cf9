-- What the broker knows: stores and sites, images, blobs and replicas, tickets and leases, uploads, what transfers reported.
-- Instants are timestamptz by the database's clock, sizes are bytes. Plain SQL and PL/pgSQL, no extension.

CREATE TABLE sites (
    path        text PRIMARY KEY,
    description text NOT NULL DEFAULT '',
    networks    cidr[] NOT NULL DEFAULT '{}',
    version     integer NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE stores (
    id                integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name              text NOT NULL UNIQUE,
    kind              text NOT NULL,
    site              text NOT NULL REFERENCES sites (path),
    endpoint          text NOT NULL,
    internal_endpoint text,
    settings          jsonb NOT NULL DEFAULT '{}',
    credential        text,
    exposure          text NOT NULL DEFAULT 'public' CHECK (exposure IN ('public', 'service')),
    enabled           boolean NOT NULL DEFAULT true,
    writable          boolean NOT NULL DEFAULT true,
    cost              double precision NOT NULL DEFAULT 0 CHECK (cost >= 0),
    read_bandwidth    bigint CHECK (read_bandwidth > 0),
    write_bandwidth   bigint CHECK (write_bandwidth > 0),
    abilities         jsonb NOT NULL DEFAULT '{}',
    probe             jsonb NOT NULL DEFAULT '[]',
    probed_at         timestamptz,
    version           integer NOT NULL DEFAULT 1,
    created_at        timestamptz NOT NULL DEFAULT now(),
    updated_at        timestamptz NOT NULL DEFAULT now()
);

-- One row per store and direction, the row that a grant locks. slots NULL: no limit, and no leases.
-- leased counts the rows of leases; expired ones stay counted until they are swept, so leased >= the unexpired ones, always.
CREATE TABLE slots (
    store_id  integer NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
    direction text NOT NULL CHECK (direction IN ('read', 'write')),
    slots     integer CHECK (slots >= 0),
    leased    integer NOT NULL DEFAULT 0 CHECK (leased >= 0),
    PRIMARY KEY (store_id, direction)
) WITH (fillfactor = 20);

-- Space taken on a store: active replicas and open uploads' reservations. capacity NULL: unknown, unlimited.
CREATE TABLE spaces (
    store_id integer PRIMARY KEY REFERENCES stores (id) ON DELETE CASCADE,
    capacity bigint CHECK (capacity >= 0),
    taken    bigint NOT NULL DEFAULT 0 CHECK (taken >= 0)
) WITH (fillfactor = 50);

CREATE TABLE blobs (
    id               uuid PRIMARY KEY,
    size             bigint CHECK (size >= 0),
    digests          jsonb NOT NULL DEFAULT '{}',
    piece_length     bigint,
    piece_algorithm  text,
    piece_digests    bytea,
    state            text NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'active', 'deleting')),
    created_at       timestamptz NOT NULL DEFAULT now(),
    CHECK (state <> 'active' OR size IS NOT NULL)
);
CREATE INDEX blobs_by_sha256 ON blobs ((digests ->> 'sha256')) WHERE state = 'active';
CREATE INDEX blobs_by_sha512 ON blobs ((digests ->> 'sha512')) WHERE state = 'active';

CREATE TABLE replicas (
    id                uuid PRIMARY KEY,
    blob_id           uuid NOT NULL REFERENCES blobs (id),
    store_id          integer NOT NULL REFERENCES stores (id),
    key               text NOT NULL,
    purpose           text NOT NULL DEFAULT 'origin' CHECK (purpose IN ('origin', 'cache')),
    state             text NOT NULL CHECK (state IN ('pending', 'active', 'unsealed', 'corrupt', 'missing', 'deleting')),
    deletable         boolean NOT NULL DEFAULT false,
    project           text NOT NULL,
    subject           text NOT NULL,
    observed_by       text CHECK (observed_by IN ('broker', 'agent')),
    observed_strength text,
    observed_at       timestamptz,
    version           integer NOT NULL DEFAULT 1,
    created_at        timestamptz NOT NULL DEFAULT now(),
    UNIQUE (store_id, key),
    CHECK (state <> 'active' OR observed_strength IS NOT NULL)
);
CREATE INDEX replicas_by_blob ON replicas (blob_id);

CREATE TABLE images (
    id         uuid PRIMARY KEY,
    name       text NOT NULL,
    project    text NOT NULL,
    subject    text NOT NULL,
    visibility text NOT NULL DEFAULT 'private' CHECK (visibility IN ('private', 'community', 'public')),
    status     text NOT NULL DEFAULT 'queued' CHECK (status IN ('queued', 'active', 'deactivated')),
    properties jsonb NOT NULL DEFAULT '{}',
    version    integer NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX images_by_project ON images (project, id);
CREATE INDEX images_public ON images (id) WHERE visibility = 'public';

-- One blob per disk format of an image.
CREATE TABLE image_blobs (
    image_id uuid NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    format   text NOT NULL,
    blob_id  uuid NOT NULL REFERENCES blobs (id),
    PRIMARY KEY (image_id, format)
);
CREATE INDEX image_blobs_by_blob ON image_blobs (blob_id);

-- Ids are UUIDs version 7, ordered by time: a range of ids is a span of days, and a look-up by id touches one partition.
CREATE TABLE tickets (
    id         uuid NOT NULL PRIMARY KEY,
    operation  text NOT NULL CHECK (operation IN ('download', 'upload')),
    state      text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'released')),
    project    text NOT NULL,
    subject    text NOT NULL,
    instance   text NOT NULL,
    address    text NOT NULL,
    site       text,
    image_id   uuid,
    blob_id    uuid NOT NULL,
    size       bigint,
    places     jsonb NOT NULL,
    expires_at timestamptz NOT NULL
) PARTITION BY RANGE (id);
CREATE TABLE tickets_default PARTITION OF tickets DEFAULT;

-- One concurrent transfer that a store with slots allows, until reported, released or expired.
CREATE TABLE leases (
    ticket_id  uuid NOT NULL,
    store_id   integer NOT NULL,
    direction  text NOT NULL,
    granted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (ticket_id, store_id),
    FOREIGN KEY (store_id, direction) REFERENCES slots (store_id, direction) ON DELETE CASCADE
);
CREATE INDEX leases_by_expiry ON leases (store_id, direction, expires_at);

CREATE TABLE reports (
    ticket_id uuid NOT NULL,
    store_id  integer NOT NULL,
    outcome   text NOT NULL CHECK (outcome IN ('ok', 'failed', 'slow', 'corrupt')),
    bytes     bigint NOT NULL,
    seconds   double precision NOT NULL,
    detail    text,
    at        timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (ticket_id, store_id)
) PARTITION BY RANGE (ticket_id);
CREATE TABLE reports_default PARTITION OF reports DEFAULT;

-- What was seen on the way from a site to a store: sums that decay together, so that an average is a quotient of two of them.
CREATE TABLE paths (
    site         text NOT NULL,
    store_id     integer NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
    direction    text NOT NULL CHECK (direction IN ('read', 'write')),
    bytes        double precision NOT NULL,
    busy_seconds double precision NOT NULL,
    setup        double precision NOT NULL,
    setup_weight double precision NOT NULL,
    good         double precision NOT NULL,
    weight       double precision NOT NULL,
    updated_at   timestamptz NOT NULL,
    PRIMARY KEY (site, store_id, direction)
) WITH (fillfactor = 50);

-- A write under way; its id is its ticket's.
CREATE TABLE uploads (
    id         uuid PRIMARY KEY,
    blob_id    uuid NOT NULL REFERENCES blobs (id),
    image_id   uuid REFERENCES images (id) ON DELETE SET NULL,
    format     text,
    purpose    text NOT NULL DEFAULT 'origin',
    project    text NOT NULL,
    subject    text NOT NULL,
    size       bigint,
    digests    jsonb NOT NULL DEFAULT '{}',
    state      text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'committing', 'committed', 'failed', 'abandoned')),
    makes_image boolean NOT NULL DEFAULT false,
    replica_id uuid,
    problem    text,
    created_at timestamptz NOT NULL DEFAULT now(),
    touched_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL
);
CREATE INDEX uploads_under_way ON uploads (expires_at) WHERE state IN ('open', 'committing');
CREATE INDEX uploads_by_blob ON uploads (blob_id);
CREATE INDEX uploads_ended ON uploads (touched_at) WHERE state IN ('committed', 'failed', 'abandoned');

-- final_key is the present committer's; sealed_keys are those that a sealing, finished or not, may have written to.
-- seen: the parts as the store told them just before they became one object.
CREATE TABLE destinations (
    upload_id    uuid NOT NULL REFERENCES uploads (id) ON DELETE CASCADE,
    store_id     integer NOT NULL REFERENCES stores (id),
    rank         integer NOT NULL,
    state        text NOT NULL CHECK (state IN ('active', 'standby', 'dropped')),
    staging_key  text NOT NULL,
    final_key    text NOT NULL,
    multipart_id text,
    part_size    bigint,
    reserved     bigint NOT NULL DEFAULT 0,
    urls_until   timestamptz NOT NULL DEFAULT now(),
    estimate     jsonb NOT NULL DEFAULT '{}',
    seen         jsonb,
    sealed_keys  text[] NOT NULL DEFAULT '{}',
    PRIMARY KEY (upload_id, store_id)
);

-- Objects and multipart uploads to be removed from a store, tried until they are gone.
CREATE TABLE deletions (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    store_id     integer NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
    key          text NOT NULL,
    multipart_id text,
    replica_id   uuid,
    frees        bigint NOT NULL DEFAULT 0,
    reason       text NOT NULL,
    due_at       timestamptz NOT NULL DEFAULT now(),
    attempts     integer NOT NULL DEFAULT 0,
    problem      text
);
CREATE INDEX deletions_due ON deletions (due_at);

-- A POST that was sent with an Idempotency-Key: the id that its resource has, or would have had.
CREATE TABLE idempotency (
    owner       text NOT NULL,
    key         text NOT NULL,
    fingerprint bytea NOT NULL,
    resource    uuid NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (owner, key)
);
CREATE INDEX idempotency_by_age ON idempotency (created_at);

-- Keys that sign transfer tokens and the broker's own bearer tokens; the private half is encrypted PKCS#8.
CREATE TABLE signing_keys (
    id          text PRIMARY KEY,
    algorithm   text NOT NULL,
    private_pem text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    signs_from  timestamptz NOT NULL,
    signs_until timestamptz,
    kept_until  timestamptz,
    revoked_at  timestamptz
);

-- What invalidates memory. Readers take entries whose transaction is older than every running one: ids do not commit in order.
CREATE TABLE changes (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xact    xid8 NOT NULL DEFAULT pg_current_xact_id(),
    kind    text NOT NULL,
    subject text NOT NULL,
    at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX changes_by_xact ON changes (xact, id);

-- record_change(kind, column): one entry for the row's column, old and new; NOTIFY only makes readers look sooner.
CREATE FUNCTION record_change() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    before jsonb := CASE WHEN TG_OP = 'INSERT' THEN NULL ELSE to_jsonb(OLD) END;
    after  jsonb := CASE WHEN TG_OP = 'DELETE' THEN NULL ELSE to_jsonb(NEW) END;
BEGIN
    INSERT INTO changes (kind, subject)
        SELECT DISTINCT TG_ARGV[0], s FROM unnest(ARRAY[before ->> TG_ARGV[1], after ->> TG_ARGV[1]]) AS s WHERE s IS NOT NULL;
    PERFORM pg_notify('changes', '');
    RETURN NULL;
END $$;

-- Who may read an image is kept in memory with its blobs.
CREATE FUNCTION record_image_blobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO changes (kind, subject) SELECT 'blob', blob_id::text FROM image_blobs WHERE image_id = NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER changed_blobs AFTER UPDATE OF visibility, status, project ON images FOR EACH ROW EXECUTE FUNCTION record_image_blobs();

CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON blobs FOR EACH ROW EXECUTE FUNCTION record_change('blob', 'id');
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON replicas FOR EACH ROW EXECUTE FUNCTION record_change('blob', 'blob_id');
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON images FOR EACH ROW EXECUTE FUNCTION record_change('image', 'id');
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON image_blobs FOR EACH ROW EXECUTE FUNCTION record_change('image', 'image_id');
CREATE TRIGGER changed_blob AFTER INSERT OR UPDATE OR DELETE ON image_blobs FOR EACH ROW EXECUTE FUNCTION record_change('blob', 'blob_id');
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON stores FOR EACH ROW EXECUTE FUNCTION record_change('store', 'name');
CREATE TRIGGER changed AFTER INSERT OR DELETE OR UPDATE OF slots ON slots FOR EACH ROW EXECUTE FUNCTION record_change('slots', 'store_id');
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON sites FOR EACH ROW EXECUTE FUNCTION record_change('site', 'path');
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON signing_keys FOR EACH ROW EXECUTE FUNCTION record_change('key', 'id');
