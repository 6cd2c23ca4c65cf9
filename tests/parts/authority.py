"""A certificate authority of a test's own, and what it signs, as PEM files; private keys are readable to their owner only."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

Kind = Literal["ec", "rsa"]
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, as files."""

    certificate: Path
    key: Path


class Authority:
    """Keeps what it makes in `directory`; `certificate` is its own, for those who are to believe it."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._key = _made("ec")
        self._name = _named(name)
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
            key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        begun = (
            self._begun(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .add_extension(usage, critical=True)
        )
        self.certificate = directory / f"{name}.crt"
        self._sign(begun, self.certificate)

    def issue(self, common_name: str, *addresses: str) -> Pair:
        """A certificate for `common_name`, good for the host names and IP addresses `addresses`."""
        pair = Pair(self._directory / f"{common_name}.crt", self._directory / f"{common_name}.key")
        self.write(pair.certificate, pair.key, common_name=common_name, addresses=addresses)
        return pair

    def write(
        self,
        certificate: Path,
        key: Path,
        kind: Kind = "ec",
        *,
        common_name: str = "127.0.0.1",
        addresses: tuple[str, ...] = ("127.0.0.1",),
    ) -> int:
        """Write a new certificate and its key into these files; the serial number."""
        made = _made(kind)
        begun = self._begun(_named(common_name), made).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
        )
        if addresses:
            begun = begun.add_extension(x509.SubjectAlternativeName([_general_name(address) for address in addresses]), critical=False)
        write_key(key, made)
        return self._sign(begun, certificate)

    def _sign(self, begun: x509.CertificateBuilder, file: Path) -> int:
        signed = begun.sign(self._key, hashes.SHA256())
        file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        return signed.serial_number

    def _begun(self, subject: x509.Name, key: _Key) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
        )


def write_key(file: Path, key: _Key, password: bytes | None = None) -> None:
    """Write a private key, encrypted if there is a `password`."""
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    file.touch(mode=0o600)
    file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


def _made(kind: Kind) -> _Key:
    return ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _named(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)
