"""Every attack against every kind of store, for real: `python -m tests.attacks` prints the table, `--write` puts it into the README."""
