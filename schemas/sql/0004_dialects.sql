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
