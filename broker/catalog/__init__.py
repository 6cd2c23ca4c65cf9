"""The catalogue in PostgreSQL: SQL beside the function that runs it, frozen dataclasses out."""
