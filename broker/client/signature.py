"""Signatures of images: the four properties ``img_signature*`` that Glance, Nova and Cinder know, checked against a certificate.

Pure: the digest of the bytes, the certificate and the time are arguments. What is accepted here is what Nova accepts (OpenStack,
"Image signature verification"; the library cursive): a base64 signature over the image's bytes, by RSA-PSS (MGF1 with the same hash,
a salt of any length), DSA or ECDSA. Here a key must also be on the very curve that the properties name.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

SIGNATURE = "img_signature"
HASH_METHOD = "img_signature_hash_method"
KEY_TYPE = "img_signature_key_type"
CERTIFICATE = "img_signature_certificate_uuid"
PROPERTIES = (SIGNATURE, HASH_METHOD, KEY_TYPE, CERTIFICATE)

_HASHES: Mapping[str, tuple[str, hashes.HashAlgorithm]] = {
    "SHA-224": ("sha224", hashes.SHA224()),
    "SHA-256": ("sha256", hashes.SHA256()),
    "SHA-384": ("sha384", hashes.SHA384()),
    "SHA-512": ("sha512", hashes.SHA512()),
}
_CURVES = ("SECT571K1", "SECT409K1", "SECT571R1", "SECT409R1", "SECP521R1", "SECP384R1")
KEY_TYPES = ("RSA-PSS", "DSA", *(f"ECC_{curve}" for curve in _CURVES))

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\Z")


class NotValid(Exception):
    """The signature does not hold; the text says why."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What the properties say: `certificate` is the id of the signer's certificate, `algorithm` hashlib's name of the hash."""

    value: bytes
    algorithm: str
    hash_method: str
    key_type: str
    certificate: str


def signature_of(properties: Mapping[str, str]) -> Signature | None:
    """The signature of an image; ``None`` when it has none. Raises `NotValid` when its properties are incomplete or make no sense."""
    if not any(name in properties for name in PROPERTIES):
        return None
    if missing := [name for name in PROPERTIES if name not in properties]:
        raise NotValid(f"the image lacks the property {missing[0]}")
    hash_method, key_type, certificate = properties[HASH_METHOD], properties[KEY_TYPE], properties[CERTIFICATE]
    if hash_method not in _HASHES:
        raise NotValid(f"{HASH_METHOD} is none of {', '.join(_HASHES)}")
    if key_type not in KEY_TYPES:
        raise NotValid(f"{KEY_TYPE} is none of {', '.join(KEY_TYPES)}")
    if not _UUID.match(certificate):
        raise NotValid(f"{CERTIFICATE} is no UUID")
    try:
        value = base64.b64decode(properties[SIGNATURE], validate=True)
    except (binascii.Error, ValueError):
        raise NotValid(f"{SIGNATURE} is no base64") from None
    return Signature(value, _HASHES[hash_method][0], hash_method, key_type, certificate.lower())


def check(signature: Signature, digest: bytes, certificate: x509.Certificate, now: datetime) -> None:
    """That `signature` was made by the certificate's key over the bytes whose hash `digest` is. `now` is aware. Raises `NotValid`."""
    if now < certificate.not_valid_before_utc:
        raise NotValid("the certificate is not valid yet")
    if now > certificate.not_valid_after_utc:
        raise NotValid("the certificate has expired")
    key, hash = certificate.public_key(), _HASHES[signature.hash_method][1]
    try:
        if signature.key_type == "RSA-PSS" and isinstance(key, rsa.RSAPublicKey):
            key.verify(signature.value, digest, padding.PSS(padding.MGF1(hash), padding.PSS.MAX_LENGTH), Prehashed(hash))
        elif signature.key_type == "DSA" and isinstance(key, dsa.DSAPublicKey):
            key.verify(signature.value, digest, Prehashed(hash))
        elif isinstance(key, ec.EllipticCurvePublicKey) and signature.key_type == f"ECC_{key.curve.name.upper()}":
            key.verify(signature.value, digest, ec.ECDSA(Prehashed(hash)))
        else:
            raise NotValid(f"the certificate's key is not of the type {signature.key_type}")
    except InvalidSignature:
        raise NotValid("the signature does not fit the bytes") from None
