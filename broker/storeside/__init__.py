"""What a storage backend runs: an offline token verifier, adapters for Python servers, and a small file server that verifies.

A server of one's own needs `verify`, which is pure, and the broker's keys: a JWKS document, or a `broker.storeside.jwks.KeySource`
that keeps them fresh. Importing this package loads no server.

``verify`` decides (pure), ``target`` reads what a request names (pure), ``jwks`` keeps the broker's published keys. Of the file
server, ``disk`` and ``uploads`` keep bytes, ``receive`` takes them in, ``application`` speaks HTTP, ``server`` is the program. It
is for Linux only: it leans on openat, OFD locks and sendfile.
"""

from broker.storeside.refused import Refused
from broker.storeside.target import check_path, read_target, read_token
from broker.storeside.verify import Grant, Keys, UnknownKey, keys_of, verify

__all__ = ["Grant", "Keys", "Refused", "UnknownKey", "check_path", "keys_of", "read_target", "read_token", "verify"]
