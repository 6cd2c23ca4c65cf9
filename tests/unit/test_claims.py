"""Reading claims is strict, and says the same as schemas/claims.json."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.claims import InvalidToken, TransferToken, from_claims

SCHEMA = json.loads((Path(__file__).parents[2] / "schemas" / "claims.json").read_text())
VALIDATOR = jsonschema_rs.validator_for(SCHEMA)

TOKEN = TransferToken("https://broker", "disk-1", "project/alice", "PUT", "/images/a b", 1000.0, 900.0, "id-1", 5, "sha256:" + "0" * 64)
CLAIMS = TOKEN.to_claims()

good = {
    "iss": st.sampled_from(["https://broker", "é"]),
    "aud": st.just("disk-1"),
    "sub": st.just("shared"),
    "exp": st.integers(0, 1 << 40) | st.floats(0, 1e12),
    "nbf": st.integers(0, 1 << 40),
    "jti": st.text("abc-", min_size=1, max_size=20),
    "mth": st.sampled_from(["GET", "PUT", "POST", "DELETE"]),
    "path": st.sampled_from(["/a", "/", "/é /%20", "/a//../b"]),
}
optional = {
    "len": st.integers(0, 1 << 53) | st.just(5.0),
    "dig": st.sampled_from(["sha256:" + "a" * 64, "md5:" + "0" * 32]),
    "upl": st.text("aZ_-9", min_size=1, max_size=200),
    "off": st.integers(0, 1 << 53),
}
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 1 << 60),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=3), max_size=2),
    st.sampled_from(
        ["sha256:" + "A" * 64, "sha1:" + "a" * 40, "md5:" + "0" * 32 + "\n", "/a\n", "/a\x00", "a" * 256, "/" + "b" * 1024, "get", "../x"]
    ),
)


@st.composite
def claim_sets(draw: st.DrawFn) -> dict[str, Any]:
    claims = draw(st.fixed_dictionaries(good, optional=optional))
    for name in draw(st.lists(st.sampled_from([*good, *optional, "scope"]), max_size=2)):
        if draw(st.booleans()):
            claims[name] = draw(junk)
        else:
            claims.pop(name, None)
    return claims


@settings(max_examples=600, suppress_health_check=[HealthCheck.too_slow])
@given(claim_sets())
def test_the_schema_says_the_same(claims: dict[str, Any]) -> None:
    try:
        from_claims(claims)
        accepted = True
    except InvalidToken:
        accepted = False
    # NaN and infinities are no JSON; no parser would hand them over, and we refuse them by ourselves.
    if all(not isinstance(value, float) or isfinite(value) for value in claims.values()):
        assert VALIDATOR.is_valid(claims) == accepted


@given(claim_sets())
def test_reading_undoes_writing(claims: dict[str, Any]) -> None:
    try:
        token = from_claims(claims)
    except InvalidToken:
        return
    written = token.to_claims()
    assert from_claims(written).to_claims() == written
    assert written["exp"] <= claims["exp"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"path": None}, "path"),
        ({"mth": "PATCH"}, "mth"),
        ({"scope": "all"}, "unknown"),
        ({"aud": ["a", "b"]}, "aud"),
        ({"exp": True}, "exp"),
        ({"exp": float("nan")}, "exp"),
        ({"len": -1}, "len"),
        ({"len": 1.5}, "len"),
        ({"off": 0}, "off"),
        ({"upl": "u"}, "part"),
        ({"mth": "GET"}, "len"),
        ({"mth": "POST"}, "upl"),
    ],
)
def test_refusals_say_which_claim(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidToken, match=reason):
        from_claims(CLAIMS | change)


def test_a_missing_claim_is_named() -> None:
    with pytest.raises(InvalidToken, match="claim missing: jti"):
        from_claims({name: value for name, value in CLAIMS.items() if name != "jti"})


def test_all_claims_are_kept() -> None:
    part = TransferToken("i", "a", "s", "PUT", "/p", 10.0, 5.0, "j", 7, "md5:" + "1" * 32, "upload-1", 14)
    assert from_claims(part.to_claims()) == part
