"""One broker after another in the same place: each with the database that it is given, all with the same files, port and name."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from broker import app, config
from broker.catalog import connect
from broker.service import keys
from broker.service.keys import Keyring
from tests.parts.broker import serve
from tests.parts.cluster import Brokers
from tests.parts.process import find_program


@contextlib.contextmanager
def generation(database: str, place: Path, port: int, settings: str = "") -> Iterator[Brokers]:
    """A broker on `database` that keeps its files in `place`, until the block ends."""
    issuer = f"http://127.0.0.1:{port}"
    with serve(database, place, settings=settings, port=port, public_url=issuer) as process:
        parsed = config.load(process.config)
        yield Brokers((process,), asyncio.run(_keyring(database, parsed)), issuer, parsed.credentials_dir)


async def _keyring(database: str, settings: config.Settings) -> Keyring:
    pool = await connect.connect(database, min_size=1, max_size=1)
    try:
        return await keys.load(pool, app.passphrase(settings.keys.passphrase_file), settings.http.public_url)
    finally:
        await pool.close()


def run_json(brokers: Brokers, command: str, *options: str, code: int = 0) -> list[Any]:
    """The JSON lines of ``broker COMMAND --json`` with the configuration of these brokers."""
    arguments = [find_program("broker", "pip install -e ."), command, "--config", str(brokers.running[0].config), "--json", *options]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return [json.loads(line) for line in done.stdout.splitlines()]
