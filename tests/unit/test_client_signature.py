"""Signatures of images, against the library that Nova and Glance verify them with."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

import castellan.common.objects.x_509
import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from cursive import exception, signature_utils

from broker.client.signature import PROPERTIES, NotValid, check, signature_of

NOW = datetime(2026, 11, 1, tzinfo=UTC)
CONTENT = b"what is booted" * 1000
ID = str(uuid.uuid4())
HASHES: dict[str, hashes.HashAlgorithm] = {
    "SHA-224": hashes.SHA224(), "SHA-256": hashes.SHA256(), "SHA-384": hashes.SHA384(), "SHA-512": hashes.SHA512(),
}  # fmt: skip

KINDS: dict[str, Callable[[], Any]] = {
    "RSA-PSS": lambda: rsa.generate_private_key(65537, 2048), "DSA": lambda: dsa.generate_private_key(2048),
    "ECC_SECP384R1": lambda: ec.generate_private_key(ec.SECP384R1()), "ECC_SECP521R1": lambda: ec.generate_private_key(ec.SECP521R1()),
}  # fmt: skip
P256 = ec.generate_private_key(ec.SECP256R1())


@cache
def key_of(kind: str) -> Any:
    """One key of each kind. To make those of RSA and DSA takes long, and whoever only looks for tests has no need of them."""
    return KINDS[kind]()


def certificate(key: Any, begins: datetime = NOW - timedelta(days=1), ends: datetime = NOW + timedelta(days=3650)) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "images")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1).public_key(key.public_key())
    signer = key_of("RSA-PSS")  # who issued it does not matter here
    return builder.not_valid_before(begins).not_valid_after(ends).sign(signer, hashes.SHA256())


def signed(key_type: str, hash_method: str, content: bytes = CONTENT, key: Any = None) -> dict[str, str]:
    hash, key = HASHES[hash_method], key or key_of(key_type)
    if key_type == "RSA-PSS":
        value = key.sign(content, padding.PSS(padding.MGF1(hash), padding.PSS.MAX_LENGTH), hash)
    elif key_type == "DSA":
        value = key.sign(content, hash)
    else:
        value = key.sign(content, ec.ECDSA(hash))
    return dict(zip(PROPERTIES, (base64.b64encode(value).decode(), hash_method, key_type, ID), strict=True))


def ours(properties: dict[str, str], content: bytes, signer: x509.Certificate) -> bool:
    """What we say."""
    try:
        found = signature_of(properties)
        assert found is not None
        check(found, hashlib.new(found.algorithm, content).digest(), signer, NOW)
    except NotValid:
        return False
    return True


def cursives(properties: dict[str, str], content: bytes, signer: x509.Certificate, patch: pytest.MonkeyPatch) -> bool:
    """What Nova says: the certificate comes from a key manager, here a constant."""

    class Manager:
        def get(self, context: object, id: str) -> object:
            return castellan.common.objects.x_509.X509(signer.public_bytes(Encoding.DER))

    patch.setattr(signature_utils.key_manager, "API", Manager)
    by_name = {
        "img_signature_certificate_uuid": properties["img_signature_certificate_uuid"],
        "img_signature_hash_method": properties["img_signature_hash_method"],
        "img_signature": properties["img_signature"],
        "img_signature_key_type": properties["img_signature_key_type"],
    }
    try:
        verifier = signature_utils.get_verifier(None, **by_name)
        for start in range(0, len(content), 1000):
            verifier.update(content[start : start + 1000])
        verifier.verify()
    except (exception.SignatureVerificationError, InvalidSignature, ValueError):
        return False
    return True


def _broken(value: str) -> str:
    raw = bytearray(base64.b64decode(value))
    raw[len(raw) // 2] ^= 1
    return base64.b64encode(bytes(raw)).decode()


CASES: list[tuple[str, Callable[[], tuple[dict[str, str], bytes, Any]], bool]] = [
    *((f"{kind} {method}", lambda kind=kind, method=method: (signed(kind, method), CONTENT, key_of(kind)), True)
      for kind in KINDS for method in HASHES),
    ("one byte changed", lambda: (signed("RSA-PSS", "SHA-256"), CONTENT[:-1] + b"!", key_of("RSA-PSS")), False),
    ("cut", lambda: (signed("ECC_SECP384R1", "SHA-384"), CONTENT[:-1], key_of("ECC_SECP384R1")), False),
    ("another hash named", lambda: ({**signed("RSA-PSS", "SHA-256"), "img_signature_hash_method": "SHA-512"}, CONTENT,
                                   key_of("RSA-PSS")), False),
    ("another signer", lambda: (signed("ECC_SECP384R1", "SHA-256"), CONTENT, ec.generate_private_key(ec.SECP384R1())), False),
    ("key of another kind", lambda: (signed("RSA-PSS", "SHA-256"), CONTENT, key_of("DSA")), False),
    ("signature damaged", lambda: (signed("DSA", "SHA-256") | {"img_signature": _broken(signed("DSA", "SHA-256")["img_signature"])},
                                   CONTENT, key_of("DSA")), False),
    ("unknown key type", lambda: ({**signed("RSA-PSS", "SHA-256"), "img_signature_key_type": "RSA"}, CONTENT, key_of("RSA-PSS")), False),
    ("unknown hash", lambda: ({**signed("RSA-PSS", "SHA-256"), "img_signature_hash_method": "MD5"}, CONTENT, key_of("RSA-PSS")), False),
    ("empty signature", lambda: ({**signed("RSA-PSS", "SHA-256"), "img_signature": ""}, CONTENT, key_of("RSA-PSS")), False),
    ("pss with a short salt", lambda: (_short_salt(), CONTENT, key_of("RSA-PSS")), True),
]  # fmt: skip


def _short_salt() -> dict[str, str]:
    value = key_of("RSA-PSS").sign(CONTENT, padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256())
    return {**signed("RSA-PSS", "SHA-256"), "img_signature": base64.b64encode(value).decode()}


@pytest.mark.parametrize(("made", "holds"), [(made, holds) for _, made, holds in CASES], ids=[name for name, _, _ in CASES])
def test_we_say_what_cursive_says(
    made: Callable[[], tuple[dict[str, str], bytes, Any]], holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties, content, key = made()
    signer = certificate(key)
    assert ours(properties, content, signer) is holds
    assert cursives(properties, content, signer, monkeypatch) is holds


def test_a_key_on_another_curve_than_the_one_named_is_refused() -> None:
    """Stricter than cursive, which takes any curve."""
    properties = signed("ECC_SECP384R1", "SHA-256", key=P256)
    assert not ours(properties, CONTENT, certificate(P256))
    assert ours(signed("ECC_SECP384R1", "SHA-256"), CONTENT, certificate(key_of("ECC_SECP384R1")))


@pytest.mark.parametrize(
    ("begins", "ends", "says"),
    [(NOW + timedelta(days=1), NOW + timedelta(days=9), "not valid yet"), (NOW - timedelta(days=9), NOW - timedelta(days=1), "expired")],
)
def test_a_certificate_counts_in_its_time_alone(begins: datetime, ends: datetime, says: str) -> None:
    found = signature_of(signed("RSA-PSS", "SHA-256"))
    assert found is not None
    with pytest.raises(NotValid, match=says):
        check(found, hashlib.sha256(CONTENT).digest(), certificate(key_of("RSA-PSS"), begins, ends), NOW)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"img_signature": "no base64!"}, "base64"),
        ({"img_signature": "äöü"}, "base64"),
        ({"img_signature_certificate_uuid": "../../etc/passwd"}, "no UUID"),
        ({"img_signature_certificate_uuid": ID + "\n"}, "no UUID"),
        ({"img_signature_certificate_uuid": ""}, "no UUID"),
        ({"img_signature_hash_method": "sha-256"}, "none of SHA-224"),
        ({"img_signature_key_type": "ECC_SECP256R1"}, "none of RSA-PSS"),
        ({"img_signature_key_type": None}, "lacks the property img_signature_key_type"),
    ],
)
def test_properties_that_make_no_sense_are_told(change: dict[str, str | None], says: str) -> None:
    properties = {name: value for name, value in {**signed("RSA-PSS", "SHA-256"), **change}.items() if value is not None}
    with pytest.raises(NotValid, match=says):
        signature_of(properties)


def test_an_image_without_a_signature_has_none() -> None:
    assert signature_of({"os_distro": "debian"}) is None
