"""`broker token create`: bearer tokens of the broker's own key, for small installations and first steps."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from pathlib import Path

import click

from broker import app, config, log
from broker.catalog import connect, migrations
from broker.cli.main import fail
from broker.cli.serve import config_option, load
from broker.embedded import EmbeddedError
from broker.errors import BrokerError
from broker.model import Role, is_site
from broker.service import keys
from broker.service.keys import WrongPassphrase
from broker.sign.token import NoSigningKey

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_TTL = re.compile(r"([0-9]{1,9})([smhd]?)\Z")


class _Seconds(click.ParamType[int]):
    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = _TTL.match(str(value))
        if match is None or not int(match[1]):
            self.fail("a number with s, m, h or d, such as 12h", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


@click.group()
def command() -> None:
    """Make bearer tokens for this broker. Whoever can read its database and passphrase can make any."""


@command.command()
@config_option
@click.option("--role", type=click.Choice([role.value for role in Role]), required=True, help="What the bearer may do.")
@click.option("--project", required=True, help="Whose images it owns.")
@click.option("--subject", default="token", show_default=True, help="Who it is.")
@click.option("--ttl", type=_Seconds(), default="1d", show_default=True, help="How long it is good: 3600, 90m, 12h, 30d.")
@click.option("--site", help="Where it is, as a proof; by default the network tells.")
def create(config_file: Path | None, role: str, project: str, subject: str, ttl: int, site: str | None) -> None:
    """Print a token. Use it as BROKER_TOKEN, or in the header `Authorization: Bearer TOKEN`."""
    for name, value in (("project", project), ("subject", subject)):
        if not 0 < len(value) <= 255 or not value.isprintable():
            fail(f"--{name}: 1 to 255 printable characters", 2)
    if site is not None and not is_site(site):
        fail("--site: a path such as eu/az1", 2)
    settings = load(config_file)
    log.configure("warning", settings.log.format)
    try:
        click.echo(asyncio.run(_create(settings, Role(role), project, subject, ttl, site)))
    except config.ConfigError as error:
        fail(str(error), 2)
    except (EmbeddedError, migrations.SchemaError, WrongPassphrase, NoSigningKey) as error:
        fail(str(error), 1)
    except BrokerError as error:
        fail(f"{error.detail or error.title} Is PostgreSQL running, and is database.url right?", 6)


async def _create(settings: config.Settings, role: Role, project: str, subject: str, ttl: int, site: str | None) -> str:
    async with app.database_url(settings) as url:
        await app.prepare_schema(settings, url)
        pool = await connect.connect(url, min_size=1, max_size=1)
        try:
            now = time.time()
            keyring = await app.load_keys(settings, pool, app.build_policy(settings.policy))
            await keyring.promise(now + ttl, now)
        finally:
            await pool.close()
    return sign(keyring, settings.auth.audience, role, project, subject, ttl, site, now)


def sign(keyring: keys.Keyring, audience: str, role: Role, project: str, subject: str, ttl: float, site: str | None, now: float) -> str:
    """A bearer token for the broker's own API, as `broker.web.auth` reads it."""
    claims = {
        "aud": audience,
        "sub": subject,
        "project": project,
        "role": role.value,
        "iat": int(now),
        "nbf": int(now),
        "exp": int(now + ttl),
    }
    return keyring.signer.sign_claims({**claims, "jti": str(uuid.uuid4())} | ({"site": site} if site else {}), now)
