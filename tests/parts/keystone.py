"""OpenStack Keystone with Fernet tokens on SQLite, and people to ask as.

`start` is a context manager; `keystone` is the fixture of the tests. Its clients are keystoneauth1's, as those of real users.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.parts.process import PartMissing, answers, free_ports, running

INSTALL = "pip install keystone"
TOKEN_SECONDS = 3600

_CONFIGURATION = """\
[DEFAULT]
log_file = {directory}/keystone.log
insecure_debug = false
[database]
connection = sqlite:///{directory}/keystone.db
[token]
expiration = {token_seconds}
allow_expired_window = 3600
[fernet_tokens]
key_repository = {directory}/fernet-keys
[fernet_receipts]
key_repository = {directory}/fernet-receipts
[credential]
key_repository = {directory}/credential-keys
[identity]
password_hash_rounds = 4
[cache]
enabled = true
backend = oslo_cache.dict
expiration_time = 600
"""


@dataclass
class KeystonePart:
    """A running Keystone. `pid` is that of its process; `password` the administrator's."""

    url: str
    directory: Path
    password: str
    port: int
    pid: int = 0
    passwords: dict[str, str] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)
    projects: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    _process: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _admin: Any = None

    def begin(self) -> None:
        """Start the server, on what is there."""
        arguments = [sys.executable, "-I", str(Path(__file__).with_name("keystone_server.py")), str(self.directory), str(self.port)]
        process = self._process.enter_context(
            running(
                arguments, log=self.directory / "server.log", ready=lambda: answers(f"{self.url}/v3"),
                environment={
                    "OS_BOOTSTRAP_PASSWORD": self.password, "OS_BOOTSTRAP_REGION_ID": "here",
                    **{f"OS_BOOTSTRAP_{name}_URL": f"{self.url}/v3" for name in ("PUBLIC", "INTERNAL", "ADMIN")},
                },
            )
        )  # fmt: skip
        self.pid = process.pid

    def end(self) -> None:
        """Kill the server."""
        self._process.close()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Killed for as long as the block lasts."""
        self.end()
        try:
            yield
        finally:
            self.begin()

    @contextlib.contextmanager
    def giving_tokens_for(self, seconds: int) -> Iterator[KeystonePart]:
        """Another server of the same Keystone for as long as the block lasts; its tokens soon end."""
        place = self.directory / f"for-{seconds}"
        place.mkdir()
        (port,) = free_ports(1)
        other = replace(self, url=f"http://127.0.0.1:{port}", directory=place, port=port, _process=contextlib.ExitStack())
        other.configure(self.directory, seconds)
        (place / "ready").touch()
        other.begin()
        try:
            yield other
        finally:
            other.end()

    def configure(self, data: Path, token_seconds: int = TOKEN_SECONDS) -> None:
        """Write the server's configuration; its data lies in the directory `data`."""
        (self.directory / "keystone.conf").write_text(_CONFIGURATION.format(directory=data, token_seconds=token_seconds))

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Accepts connections and says nothing for as long as the block lasts."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def session(self, user: str, project: str | None = None, **scope: Any) -> Any:
        """keystoneauth1's session of a user, scoped to a project, or as its plugin's other arguments say."""
        from keystoneauth1 import session
        from keystoneauth1.identity import v3

        password = self.password if user == "admin" else self.passwords[user]
        if project is not None:
            scope = {"project_name": project, "project_domain_name": "Default"}
        plugin = v3.Password(auth_url=f"{self.url}/v3", username=user, password=password, user_domain_name="Default", **scope)
        made = session.Session(auth=plugin)
        made.session.trust_env = False
        return made

    def token(self, user: str, project: str | None = None, **scope: Any) -> str:
        """A fresh token of a user."""
        return str(self.session(user, project, **scope).get_token())

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, **headers: str) -> Any:
        """A request of the administrator, who must be allowed it; the answer's JSON."""
        self._admin = self._admin or self.session("admin", "admin")
        return self.ask_as(self._admin, method, path, body, **headers)

    def ask_as(self, session: Any, method: str, path: str, body: Mapping[str, Any] | None = None, **headers: str) -> Any:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = session.request(f"{self.url}/v3{path}", method, json=body, headers=named, authenticated=True)
        return answer.json() if answer.content else None

    def user(self, name: str, grants: Mapping[str, Sequence[str]]) -> str:
        """Make a user with roles by project (made when there is none); the user's id."""
        self.passwords[name] = secrets.token_urlsafe(16)
        entry = {"name": name, "password": self.passwords[name], "domain_id": "default", "enabled": True}
        self.users[name] = self.ask("POST", "/users", {"user": entry})["user"]["id"]
        for project, roles in grants.items():
            for role in roles:
                self.ask("PUT", f"/projects/{self.project(project)}/users/{self.users[name]}/roles/{self.role(role)}")
        return self.users[name]

    def project(self, name: str) -> str:
        """A project's id; made when there is none."""
        if name not in self.projects:
            self.projects[name] = self.ask("POST", "/projects", {"project": {"name": name, "domain_id": "default"}})["project"]["id"]
        return self.projects[name]

    def role(self, name: str) -> str:
        """A role's id; made when there is none."""
        if not self.roles:
            self.roles.update({role["name"]: role["id"] for role in self.ask("GET", "/roles")["roles"]})
        if name not in self.roles:
            self.roles[name] = self.ask("POST", "/roles", {"role": {"name": name}})["role"]["id"]
        return self.roles[name]

    def revoke(self, token: str) -> None:
        self.ask("DELETE", "/auth/tokens", X_Subject_Token=token)


@contextlib.contextmanager
def start(directory: Path) -> Iterator[KeystonePart]:
    """Run Keystone with its data in `directory` until the block ends; the user ``broker`` may validate tokens."""
    if importlib.util.find_spec("keystone") is None:
        raise PartMissing(f"OpenStack Keystone is not installed; install it with: {INSTALL}")
    for name in ("fernet-keys", "fernet-receipts", "credential-keys"):
        (directory / name).mkdir(mode=0o700)
    (port,) = free_ports(1)
    part = KeystonePart(f"http://127.0.0.1:{port}", directory, secrets.token_urlsafe(16), port)
    part.configure(directory)
    part.begin()
    try:
        part.user("broker", {"service": ["service"]})
        yield part
    finally:
        part.end()


@pytest.fixture(scope="session")
def keystone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeystonePart]:
    with start(tmp_path_factory.mktemp("keystone")) as part:
        yield part
