-- compatible-with: previous
-- Whether the broker may open addresses inside its own network for a store. True for stores that were registered before there was
-- the question, by this step or by a broker of the version before it: they were tried and worked. New code always says which.

ALTER TABLE stores ADD COLUMN internal boolean NOT NULL DEFAULT true;
