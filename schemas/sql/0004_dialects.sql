-- compatible-with: previous
-- The clients that people already have. Each section says whose words it holds.

-- Images (broker/catalog/images.py). The code before this step knows neither the visibility "shared" nor the status "pending", so both
-- are stored as what is safe in its hands: a shared image is a private one with this mark, an unapproved one is deactivated.
ALTER TABLE images ADD COLUMN shared boolean NOT NULL DEFAULT false;
ALTER TABLE images ADD COLUMN vetting text CHECK (vetting IN ('pending', 'approved', 'rejected'));
ALTER TABLE images ADD COLUMN tags text[] NOT NULL DEFAULT '{}';
ALTER TABLE images ADD COLUMN protected boolean NOT NULL DEFAULT false;
ALTER TABLE images ADD COLUMN hidden boolean NOT NULL DEFAULT false;
ALTER TABLE images ADD COLUMN min_disk integer NOT NULL DEFAULT 0 CHECK (min_disk >= 0);
ALTER TABLE images ADD COLUMN min_ram integer NOT NULL DEFAULT 0 CHECK (min_ram >= 0);
-- What the image was declared as before there are bytes; NULL: nothing was said.
ALTER TABLE images ADD COLUMN disk_format text;
ALTER TABLE images ADD COLUMN container_format text;

-- An image that waits for approval never becomes active, whoever says that its bytes are there.
CREATE FUNCTION withhold_unapproved() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.status := 'deactivated';
    RETURN NEW;
END $$;
CREATE TRIGGER withheld BEFORE INSERT OR UPDATE ON images FOR EACH ROW
    WHEN (NEW.status = 'active' AND NEW.vetting IN ('pending', 'rejected')) EXECUTE FUNCTION withhold_unapproved();

-- Who may read a blob follows from these.
DROP TRIGGER changed_blobs ON images;
CREATE TRIGGER changed_blobs AFTER UPDATE OF visibility, shared, status, vetting, project ON images
    FOR EACH ROW EXECUTE FUNCTION record_image_blobs();

-- Projects that a shared image is shared with, and what they said to it.
CREATE TABLE image_members (
    image_id   uuid NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    project    text NOT NULL,
    status     text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'accepted', 'rejected')),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (image_id, project)
);
CREATE INDEX image_members_by_project ON image_members (project, image_id);

CREATE FUNCTION record_member() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    image uuid := CASE WHEN TG_OP = 'DELETE' THEN OLD.image_id ELSE NEW.image_id END;
BEGIN
    INSERT INTO changes (kind, subject)
        SELECT 'image', image::text UNION ALL SELECT 'blob', blob_id::text FROM image_blobs WHERE image_id = image;
    PERFORM pg_notify('changes', '');
    RETURN NULL;
END $$;
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON image_members FOR EACH ROW EXECUTE FUNCTION record_member();

-- Copies (broker/catalog/copies.py): replicas that agents are asked to make. Who takes one has it until taken_until and renews that;
-- attempts counts the takers, and names the present one's turn.
CREATE TABLE copies (
    id          uuid PRIMARY KEY,
    image_id    uuid NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    blob_id     uuid NOT NULL REFERENCES blobs (id) ON DELETE CASCADE,
    store_id    integer NOT NULL REFERENCES stores (id) ON DELETE CASCADE,
    purpose     text NOT NULL DEFAULT 'origin' CHECK (purpose IN ('origin', 'cache')),
    project     text NOT NULL,
    subject     text NOT NULL,
    state       text NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'running', 'done', 'failed')),
    agent       text,
    taken_until timestamptz,
    attempts    integer NOT NULL DEFAULT 0,
    bytes       bigint NOT NULL DEFAULT 0 CHECK (bytes >= 0),
    problem     text,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX copies_under_way ON copies (blob_id, store_id) WHERE state IN ('queued', 'running');
CREATE INDEX copies_by_image ON copies (image_id, id);
CREATE INDEX copies_by_store ON copies (store_id);

-- Vetting (broker/vet.py, broker/catalog/verdicts.py): since when an image waits, what was decided of it, what agents said of its signature.
ALTER TABLE images ADD COLUMN vetting_at timestamptz;
CREATE INDEX images_waiting ON images (vetting_at) WHERE vetting = 'pending';

CREATE FUNCTION note_vetting() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.vetting_at := now();
    RETURN NEW;
END $$;
CREATE TRIGGER vetting_begins BEFORE INSERT ON images FOR EACH ROW WHEN (NEW.vetting = 'pending') EXECUTE FUNCTION note_vetting();
CREATE TRIGGER vetting_begins_anew BEFORE UPDATE ON images FOR EACH ROW
    WHEN (NEW.vetting = 'pending' AND OLD.vetting IS DISTINCT FROM 'pending') EXECUTE FUNCTION note_vetting();

CREATE TABLE image_verdicts (
    id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    image_id  uuid NOT NULL REFERENCES images (id) ON DELETE CASCADE,
    outcome   text NOT NULL CHECK (outcome IN ('approved', 'rejected', 'valid', 'invalid')),
    blobs     jsonb NOT NULL,
    signature jsonb NOT NULL,
    subject   text NOT NULL,
    project   text NOT NULL,
    detail    text NOT NULL,
    at        timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX image_verdicts_by_image ON image_verdicts (image_id, id);

-- Uploads whose bytes somebody else carries, such as deploy/nginx/edge.conf (broker/catalog/uploads.py). The carrier is known by a secret,
-- of which this is the SHA-256; staged bytes wait until an import asks for them.
ALTER TABLE uploads ADD COLUMN carrier bytea;
ALTER TABLE uploads ADD COLUMN staged boolean NOT NULL DEFAULT false;
CREATE INDEX uploads_of_images ON uploads (image_id) WHERE state IN ('open', 'committing');

-- Git LFS (broker/catalog/repositories.py): the image that an object of a project's repository is, by the SHA-256 that names it there.
-- The key is taken before the image is made, so that of two who make the same object at once only one does.
CREATE TABLE lfs_objects (
    project    text NOT NULL,
    repository text NOT NULL,
    oid        text NOT NULL,
    image_id   uuid NOT NULL UNIQUE REFERENCES images (id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
    PRIMARY KEY (project, repository, oid)
);

-- The digests that every URL for a single PUT to this place bound; NULL while there is none (broker/catalog/uploads.py).
ALTER TABLE destinations ADD COLUMN bound text[];

-- Lists of images, newest first (broker/catalog/image_search.py).
CREATE INDEX images_by_creation ON images (created_at, id);
-- Commands name images by their names; and lists that are sorted by them.
CREATE INDEX images_by_name ON images (name);

-- Ids of deleted images that had bytes (broker/catalog/images.py): who still uses such an id is not to be given somebody else's bytes by it.
CREATE TABLE former_images (id uuid PRIMARY KEY);

CREATE FUNCTION keep_former_ids() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO former_images SELECT id FROM gone WHERE status <> 'queued' ON CONFLICT DO NOTHING;
    RETURN NULL;
END $$;
CREATE TRIGGER former AFTER DELETE ON images REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION keep_former_ids();
