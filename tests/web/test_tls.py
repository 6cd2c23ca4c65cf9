"""The API over TLS, with an authority of the test's own: who believes whom, which versions, and new certificates without a break."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker import config
from broker.client.api import Broker
from broker.client.trouble import BrokerUnreachable, WrongSetting
from broker.web import tls
from broker.web.tls import Certificate
from tests.parts.authority import Authority, write_key
from tests.parts.broker import RunningBroker, broker_on, serve
from tests.parts.condition import until
from tests.parts.process import answers

ASK = b"GET /v1 HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass(frozen=True)
class Secured:
    authority: Authority
    certificate: Path
    key: Path
    broker: RunningBroker

    @property
    def port(self) -> int:
        return int(self.broker.url.rpartition(":")[2])

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority.certificate))

    async def serial(self) -> int:
        """The serial number of the certificate that a new connection gets."""
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.trust())
        found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return x509.load_der_x509_certificate(found).serial_number


@pytest.fixture
async def secured(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Secured]:
    monkeypatch.setattr(tls, "WATCH_SECONDS", 0.05)
    made = Authority(tmp_path / "authority")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    made.write(certificate, key, "rsa")
    settings = {"http": {"tls_certificate": str(certificate), "tls_key": str(key)}}
    async with broker_on(database, tmp_path, settings) as broker:
        yield Secured(made, certificate, key, broker)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(ASK)
    return await asyncio.wait_for(reader.readuntil(b"}"), 20)


async def test_who_believes_the_authority_is_answered(secured: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    url = secured.broker.url.replace("http://", "https://")
    monkeypatch.setenv("BROKER_CA_FILE", str(secured.authority.certificate))
    async with Broker(url, secured.broker.token(), patience=0) as client:
        assert (await client.service()).version
        assert [image async for image in client.images()] == []
    monkeypatch.delenv("BROKER_CA_FILE")
    async with Broker(url, secured.broker.token(), patience=0) as client:
        with pytest.raises(BrokerUnreachable, match=r"the certificate of the broker at https://.* is not believed") as caught:
            await client.service()
        assert "BROKER_CA_FILE" in caught.value.hint
    async with Broker(secured.broker.url, secured.broker.token(), patience=0) as client:  # no TLS
        with pytest.raises(BrokerUnreachable) as caught:
            await client.service()
        assert "https://" in caught.value.hint
    for bad, said in ((secured.key, "no PEM of certificates"), (Path("/nowhere.pem"), "No such file")):
        monkeypatch.setenv("BROKER_CA_FILE", str(bad))
        with pytest.raises(WrongSetting, match=f"BROKER_CA_FILE: .*{said}"):
            Broker(url, "token")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize(
    ("version", "spoken"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)]
)
async def test_tls_1_2_and_newer(secured: Secured, version: ssl.TLSVersion, spoken: bool) -> None:
    context = secured.trust()
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = version
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", secured.port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        assert not spoken
    else:
        assert spoken
        assert (await ask(reader, writer)).startswith(b"HTTP/1.1 200 ")
        writer.transport.abort()


async def test_a_new_certificate_is_taken_up_and_open_connections_go_on(secured: Secured) -> None:
    """Also one with a key of another type, and also when the two files are not replaced at once."""
    before = await secured.serial()
    reader, writer = await asyncio.open_connection("127.0.0.1", secured.port, ssl=secured.trust())
    for kind in ("ec", "rsa", "ec"):
        serial = secured.authority.write(secured.certificate, secured.key, kind)  # type: ignore[arg-type]

        async def is_new(serial: int = serial) -> bool:
            return await secured.serial() == serial

        await until(is_new)
        assert serial != before
        assert (await ask(reader, writer)).lstrip(b"\r\n").startswith(b"HTTP/1.1 200 ")
        before = serial
    writer.transport.abort()


async def test_a_pair_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    made = Authority(tmp_path)
    certificate, key, other = tmp_path / "c.pem", tmp_path / "k.pem", tmp_path / "other.pem"
    made.write(certificate, key)
    pair = Certificate(certificate, key)
    kept = pair._current
    made.write(other, tmp_path / "unused.pem")
    certificate.write_bytes(other.read_bytes())
    assert pair.reload() is False
    assert pair._current is kept
    key.unlink()
    assert pair.reload() is False
    made.write(certificate, key)
    assert pair.reload() is True
    assert pair._current is not kept


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda certificate, key: key.unlink(), "http.tls_key: .*No such file"),
        (lambda certificate, key: certificate.unlink(), "http.tls_certificate: .*No such file"),
        (lambda certificate, key: certificate.write_text("nothing"), "no PEM"),
        (lambda certificate, key: key.write_bytes(certificate.read_bytes()), "no PEM"),
        (lambda certificate, key: write_key(key, ec.generate_private_key(ec.SECP256R1())), "do not belong together"),
        (lambda certificate, key: write_key(key, ec.generate_private_key(ec.SECP256R1()), b"pw"), "is encrypted"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, spoil: Callable[[Path, Path], Any], said: str) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    Authority(tmp_path).write(certificate, key)
    spoil(certificate, key)
    with pytest.raises(config.ConfigError, match=said):
        Certificate(certificate, key)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"tls_certificate": "c.pem"}, "http.tls_key"),
        ({"tls_key": "k.pem"}, "http.tls_certificate"),
        ({"tls_certificate": "c.pem", "tls_key": "k.pem", "public_url": "http://broker.example"}, "http.public_url"),
    ],
)
def test_settings_that_do_not_fit(section: dict[str, str], said: str) -> None:
    with pytest.raises(config.ConfigError, match=said):
        config.parse({"http": section})


def test_the_public_url_follows() -> None:
    assert config.parse({"http": {"tls_certificate": "c", "tls_key": "k"}}).http.public_url == "https://127.0.0.1:8080"
    assert config.parse({"http": {"public_url": "https://front.example"}}).http.public_url == "https://front.example"  # a front has the TLS


def test_sighup_takes_the_certificate_up_again_and_ends_nothing(database: str, tmp_path: Path) -> None:
    made = Authority(tmp_path)
    with serve(database, tmp_path / "broker", authority=made) as broker:
        os.kill(broker.pid, signal.SIGHUP)
        asyncio.run(until(lambda: _has(broker.log, "certificate taken up")))
        assert answers(f"{broker.url}/v1", authority=made.certificate)


async def _has(log: Path, text: str) -> bool:
    return text in log.read_text()
