-- compatible-with: previous
-- One step, since the code before it may be one step behind and no further. Two subjects: keys that rotate, and internal stores.

-- Keys rotate. A key whose signs_from is infinity stands by: published, so that every verifier knows it when it has to sign.

-- The end of the last bearer token that the key is known to have signed; such tokens may live longer than any URL. Of those
-- that were made before this step nothing is known, so their keys are kept for a year after they retire at least.
ALTER TABLE signing_keys ADD COLUMN tokens_until timestamptz;
UPDATE signing_keys SET tokens_until = now() + interval '365 days';

-- Memory holds nothing of tokens_until, nor of how the private half is encrypted.
DROP TRIGGER changed ON signing_keys;
CREATE TRIGGER changed AFTER INSERT OR DELETE OR UPDATE OF signs_from, signs_until, kept_until, revoked_at ON signing_keys
    FOR EACH ROW EXECUTE FUNCTION record_change('key', 'id');

-- Whether the broker may open addresses inside its own network for a store. True for stores that were registered before there was
-- the question, by this step or by a broker of the version before it: they were tried and worked. New code always says which.

ALTER TABLE stores ADD COLUMN internal boolean NOT NULL DEFAULT true;
