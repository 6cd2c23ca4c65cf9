"""Signatures that stores verify: AWS Signature V4, Swift TempURL, JWT. Pure: no I/O, no clock; `now` is an argument."""
