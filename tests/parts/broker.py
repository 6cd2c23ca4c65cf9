"""Brokers for tests: one in this process, with its API checked against the contract at every answer; and one as a process of
its own, to be killed.

`broker` is a running broker on a fresh database, `api` speaks to it. `serve` starts `broker serve` on any database.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema_rs
import orjson
import pytest
from yarl import URL

from broker import app, config
from broker.catalog import connect
from broker.cli.token import sign
from broker.model import Role
from broker.service import keys
from broker.service.context import Context
from broker.web import contract
from broker.web.contract import Contract
from broker.web.dialects import DIALECTS
from tests.parts.authority import Authority
from tests.parts.process import answers, find_program, free_ports, running

PROJECT = "demo"
AUDIENCE = "transfer-broker"


@dataclass(frozen=True)
class RunningBroker:
    """A broker in this process. Files NAME.json in `credentials_dir` are its credentials."""

    url: str
    metrics_url: str
    context: Context
    credentials_dir: Path

    def token(
        self, role: Role | str = Role.MEMBER, project: str = PROJECT, subject: str = "alice", ttl: float = 3600, site: str | None = None
    ) -> str:
        """A bearer token of the broker's own key."""
        return sign(self.context.keys, AUDIENCE, Role(role), project, subject, ttl, site, time.time())

    def credential(self, name: str, entries: Mapping[str, str]) -> str:
        """Make a credential; its name."""
        self.credentials_dir.mkdir(parents=True, exist_ok=True)
        file = self.credentials_dir / f"{name}.json"
        file.touch(mode=0o600)
        file.write_bytes(orjson.dumps(dict(entries)))
        return name


@dataclass(frozen=True)
class Reply:
    """An answer that was found to be what the contract says. `body` is ``None`` when there is none."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def etag(self) -> str:
        return self.headers["ETag"]


class Api:
    """Speaks to a broker as one principal, and fails on every answer that the contract does not describe."""

    def __init__(self, url: str, session: aiohttp.ClientSession, token: str | None, headers: Mapping[str, str] | None = None) -> None:
        self.url = url
        self._session = session
        self._token = token
        self._headers = dict(headers or {})

    def as_(self, token: str | None, **headers: str) -> Api:
        """The same broker for another principal, or with more headers (``_`` stands for ``-``)."""
        return Api(self.url, self._session, token, {name.replace("_", "-"): value for name, value in headers.items()})

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.send("GET", path, headers=headers)

    async def post(self, path: str, body: Any = None, **headers: str) -> Reply:
        return await self.send("POST", path, body, headers=headers)

    async def patch(self, path: str, body: Any, etag: str) -> Reply:
        return await self.send("PATCH", path, body, headers={"If-Match": etag, "Content-Type": "application/merge-patch+json"})

    async def delete(self, path: str, etag: str | None = None) -> Reply:
        return await self.send("DELETE", path, headers={"If-Match": etag} if etag is not None else {})

    async def send(
        self, method: str, path: str, body: Any = None, *, raw: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """One request; `body` is sent as JSON, `raw` as it is."""
        sent = {**self._headers, **{name.replace("_", "-"): value for name, value in (headers or {}).items()}}
        if self._token is not None:
            sent.setdefault("Authorization", f"Bearer {self._token}")
        data = raw if raw is not None else orjson.dumps(body) if body is not None else None
        if data is not None:
            sent.setdefault("Content-Type", "application/json")
        url = URL(self.url + path, encoded=True)
        async with self._session.request(method, url, data=data, headers=sent, allow_redirects=False) as response:
            content = await response.read()
            reply = Reply(response.status, response.headers, orjson.loads(content) if content else None)
        check_against_contract(method, path, reply)
        return reply


def check_against_contract(method: str, path: str, reply: Reply) -> None:
    """Fails unless the contract has this answer for this operation. Paths that it does not have answer 404, methods 405."""
    assert reply.headers.get("X-Request-Id")
    spoken, found = _described(method, path)
    if found is None:
        assert reply.status in (404, 405), f"{method} {path} is not in the contract and answers {reply.status}"
        (described,) = spoken.document["components"]["responses"].values()  # every contract has one shape for errors
    else:
        responses = found["responses"]
        assert str(reply.status) in responses, f"{method} {path}: {reply.status} is not in the contract: {reply.body}"
        described = spoken.resolve(responses[str(reply.status)])
    if "content" not in described:
        assert reply.body is None
        return
    ((media_type, entry),) = described["content"].items()
    schema = entry["schema"]
    assert reply.headers["Content-Type"] == media_type
    validator = jsonschema_rs.Draft202012Validator({**schema, "components": spoken.document["components"]})
    faults = [f"{list(fault.instance_path)}: {fault.message}" for fault in validator.iter_errors(reply.body)]
    assert not faults, f"{method} {path} {reply.status}: {faults}"


def _described(method: str, path: str) -> tuple[Contract, Any]:
    """The contract that a path belongs to, and what it says of the operation."""
    path = path.partition("?")[0]
    for dialect in DIALECTS:
        for template, item in dialect.contract.document["paths"].items():
            if re.fullmatch(re.sub(r"\\\{[a-z_]+\\\}", "[^/]+", re.escape(template)), path):
                return dialect.contract, item.get(method.lower())
    return next((dialect.contract for dialect in DIALECTS[1:] if dialect.has(path)), contract.NATIVE), None


@contextlib.asynccontextmanager
async def broker_on(database: str, place: Path, settings: Mapping[str, Any] | None = None, **how: Any) -> AsyncIterator[RunningBroker]:
    """A broker in this process on the database with this URL. `settings` are sections to be merged in; `how` goes to `app.running`."""
    port, metrics_port = free_ports(2)
    document: dict[str, Any] = {
        "data_dir": str(place / "data"),
        "http": {"listen": f"127.0.0.1:{port}", "metrics_listen": f"127.0.0.1:{metrics_port}"},
        "database": {"url": database, "migrate": "auto"},
    }
    for name, section in (settings or {}).items():
        document[name] = {**document.get(name, {}), **section} if isinstance(section, Mapping) else section
    parsed = config.parse(document)
    async with app.running(parsed, **how) as broker:
        yield RunningBroker(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}", broker.context, parsed.credentials_dir)


@pytest.fixture
async def broker(database: str, tmp_path: Path) -> AsyncIterator[RunningBroker]:
    """A broker on a fresh database."""
    async with broker_on(database, tmp_path) as running_broker:
        yield running_broker


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def api(broker: RunningBroker, session: aiohttp.ClientSession) -> Api:
    """The broker's API for a member of the project ``demo``; ``api.as_(broker.token("admin"))`` for others."""
    return Api(broker.url, session, broker.token())


@dataclass(frozen=True)
class BrokerProcess:
    """A broker as a process of its own."""

    url: str
    metrics_url: str
    pid: int
    config: Path
    database: str
    log: Path

    def token(self, role: Role | str = Role.MEMBER, project: str = PROJECT, subject: str = "alice", ttl: float = 3600) -> str:
        """A bearer token, signed with the key in its database."""
        return asyncio.run(mint(self.database, self.config, role, project, subject, ttl))


async def mint(
    database: str, config_file: Path, role: Role | str, project: str = PROJECT, subject: str = "alice", ttl: float = 3600
) -> str:
    """A bearer token for the broker with this configuration."""
    settings = config.load(config_file)
    pool = await connect.connect(database, min_size=1, max_size=1)
    try:
        keyring = await keys.load(pool, app.passphrase(settings.keys.passphrase_file), settings.http.public_url)
    finally:
        await pool.close()
    return sign(keyring, AUDIENCE, Role(role), project, subject, ttl, None, time.time())


@contextlib.contextmanager
def serve(
    database: str,
    place: Path,
    *,
    settings: str = "",
    only: str | None = None,
    port: int | None = None,
    public_url: str | None = None,
    host: str = "127.0.0.1",
    options: Sequence[str] = (),
    authority: Authority | None = None,
    http: str = "",
) -> Iterator[BrokerProcess]:
    """`broker serve` on the database with this URL, keeping its files in `place`. Killed at the end.

    `settings` is more TOML, `http` more lines of that section.

    With an `authority` the API has a certificate of it.
    A second one with the same `place` and `port` is a restart; several with the same `place` and `public_url` belong together.
    """
    api_port, metrics_port = free_ports(2)
    api_port = port or api_port
    place.mkdir(parents=True, exist_ok=True)
    file = place / f"broker-{metrics_port}.toml"
    url, secured = f"http://{host}:{api_port}", ""
    if authority is not None:
        certificate, key = place / f"broker-{metrics_port}.pem", place / f"broker-{metrics_port}.key"
        authority.write(certificate, key)
        url, secured = f"https://{host}:{api_port}", f'tls_certificate = "{certificate}"\ntls_key = "{key}"\n'
    file.write_text(
        f'data_dir = "{place / "data"}"\n[http]\nlisten = "{host}:{api_port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
        f'public_url = "{public_url or url}"\n{secured}{http}'
        f'[database]\nurl = "{database}"\nmigrate = "auto"\n{settings}'
    )
    file.chmod(0o600)
    program = find_program("broker", "pip install -e '.[test]'")
    log = place / f"broker-{metrics_port}.log"
    arguments = [program, "serve", "--config", str(file), *(["--only", only] if only else []), *options]
    with running(arguments, log=log, ready=lambda: answers(f"http://127.0.0.1:{metrics_port}/healthz")) as process:
        if only != "jobs":
            _wait_for_api(f"{url}/v1", authority.certificate if authority is not None else None)
        yield BrokerProcess(url, f"http://127.0.0.1:{metrics_port}", process.pid, file, database, log)


def _wait_for_api(url: str, authority: Path | None) -> None:
    end = time.monotonic() + 30
    while not answers(url, authority=authority):
        assert time.monotonic() < end, f"{url} does not answer"
        time.sleep(0.02)
