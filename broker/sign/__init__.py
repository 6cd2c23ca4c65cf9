"""Signatures and tokens that stores verify: pure functions of key, request and instant."""
