"""What a storage backend runs: an offline token verifier and a small file server that verifies."""
