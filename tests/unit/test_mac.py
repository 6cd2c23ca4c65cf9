"""Our HMAC is Python's own."""

from __future__ import annotations

import hmac

from hypothesis import example, given
from hypothesis import strategies as st

from broker.sign.mac import Mac


@given(st.binary(max_size=200), st.lists(st.binary(max_size=300), max_size=3), st.sampled_from(["sha256", "sha512"]))
@example(b"longer than a block" * 10, [b"x"], "sha256")
def test_equals_the_standard_library(key: bytes, messages: list[bytes], digest: str) -> None:
    mac = Mac(key, digest)
    for message in messages:
        assert mac.digest(message) == hmac.digest(key, message, digest)
        assert mac.hexdigest(message) == hmac.digest(key, message, digest).hex()
