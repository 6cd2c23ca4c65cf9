"""TLS of the API: one certificate with its key, from files, taken up again when they change.

Rules: TLS 1.2 or newer, with the ciphers that OpenSSL takes for secure. New connections get the new certificate, those that are open go
on with the old one. Files that do not fit together, as in the middle of being replaced, change nothing: the last pair that did
goes on, and the log says so. The key is not encrypted; its file is for the broker alone.
"""

from __future__ import annotations

import asyncio
import ssl
import stat
from pathlib import Path
from typing import Any

import structlog

from broker.config import ConfigError

WATCH_SECONDS = 2.0
HANDSHAKE_SECONDS = 10.0

_log = structlog.get_logger(__name__)


class Certificate:
    """A certificate chain and its key. `context` is for the listener. Raises `ConfigError` when they cannot be used."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = certificate, key
        self._seen = self._look()
        self._current = self._load()
        # A listener keeps its context; that of each handshake is chosen here. (Loaded into one context, a new certificate with
        # a key of another type would stand beside the old one, and the client would choose.)
        self.context = self._load()
        self.context.sni_callback = self._choose

    def reload(self) -> bool:
        """Take the files as they are now; ``False`` when they cannot be used, and the last ones go on."""
        self._seen = self._look()
        try:
            self._current = self._load()
        except ConfigError as error:
            _log.error("the certificate cannot be taken up; the one before goes on", error=str(error))
            return False
        _log.info("certificate taken up", file=str(self._files[0]))
        return True

    async def watch(self) -> None:
        """Reload whenever one of the files changes, for ever."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._look() != self._seen:
                self.reload()

    def _choose(self, connection: Any, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _load(self) -> ssl.SSLContext:
        certificate, key = self._files
        for field, file in (("http.tls_certificate", certificate), ("http.tls_key", key)):
            try:
                with file.open("rb"):
                    pass
            except OSError as error:
                raise ConfigError(f"{field}: {file}: {error.strerror}") from None
        if key.stat().st_mode & stat.S_IROTH:
            _log.warning("everybody can read the key of the certificate", path=str(key), run=f"chmod 600 {key}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(certificate, key, password=_refuse)
        except _Encrypted:
            raise ConfigError(f"http.tls_key: {key} is encrypted; give the plain key, in a file that only the broker can read") from None
        except ssl.SSLError as error:
            said = "they do not belong together" if error.reason == "KEY_VALUES_MISMATCH" else "no PEM of a certificate and its key"
            raise ConfigError(f"http.tls_certificate, http.tls_key: {certificate}, {key}: {said}") from None
        return context

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What tells whether a file is another one."""
        return tuple(_state(file) for file in self._files)


class _Encrypted(Exception):
    pass


def _refuse() -> str:
    raise _Encrypted


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
