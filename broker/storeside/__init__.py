"""What a storage backend runs: an offline token verifier and a small file server that verifies.

``verify`` decides (pure), ``jwks`` keeps the broker's published keys, ``disk`` and ``uploads`` keep bytes, ``receive`` takes
them in, ``application`` speaks HTTP, ``server`` is the program. Linux only: it leans on openat, OFD locks and sendfile.
"""
