"""The catalogue, on a real PostgreSQL."""
