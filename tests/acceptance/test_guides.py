"""The guides to S3 and Swift stores do what they say: their blocks run in one shell, on real servers, as a reader would run them.

The mark of a block is that of the README (``test_readme.py``). Names of hosts and the credentials directory are replaced.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.acceptance.test_readme import blocks, run_script
from tests.parts import seaweedfs
from tests.parts.broker import BrokerProcess, serve
from tests.parts.process import find_program
from tests.parts.swift import SwiftPart

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
GUIDES = [DEPLOY / "s3" / "guide.rst", DEPLOY / "swift" / "guide.rst"]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.parent.name)
def test_it_renders_and_every_mark_is_found(guide: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docutils", "--halt=2", "--writer=html5", str(guide), str(tmp_path / "guide.html")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(blocks(guide)) == len(re.findall(r"^\.\. tested", guide.read_text(), re.MULTILINE)) > 5


def follow(guide: Path, home: Path, broker: BrokerProcess, places: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Run every block of a guide; all that was printed. Fails where a block does not print what it promises."""
    credentials = home / "data" / "credentials"
    credentials.mkdir(parents=True)
    credentials.chmod(0o700)
    programs = {
        str(Path(find_program(name, install)).parent)
        for name, install in (("broker", "pip install -e ."), ("curl", "apt-get install curl"))
    }
    script = ["set -euo pipefail"]
    steps = blocks(guide)
    for number, block in enumerate(steps):
        commands = block.commands
        for before, after in {**places, "/etc/transfer-broker/credentials": str(credentials)}.items():
            commands = commands.replace(before, after)
        script += [f"echo '=== block {number}'", commands]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "XDG_", "AWS_", "ST_", "OS_"))}
    path = os.pathsep.join([*sorted(programs), os.environ["PATH"]])
    more = {"HOME": str(home), "PATH": path, "BROKER_URL": broker.url, "BROKER_TOKEN": broker.token("admin")}
    output = run_script("\n".join(script), home, {**kept, **more, **environment})
    printed = re.split(r"=== block \d+\n", output)[1:]
    for block, text in zip(steps, printed, strict=True):
        missing = [word for word in block.words if word not in text]
        assert not missing, f"{missing} not in what this printed:\n{block.commands}\n\n{text}"
    return output


def test_an_s3_store(database: str, tmp_path: Path) -> None:
    find_program("aws", "apt-get install awscli")
    with seaweedfs.start(tmp_path / "weed", iam=True) as part, serve(database, tmp_path) as broker:
        admin = {"AWS_ACCESS_KEY_ID": part.access_key, "AWS_SECRET_ACCESS_KEY": part.secret_key}
        output = follow(
            GUIDES[0], tmp_path, broker, {"https://s3.example.org": part.endpoint}, {**admin, "AWS_DEFAULT_REGION": part.region}
        )
        assert output.count("AccessDenied") >= 7
        assert part.secret_key not in output


def test_a_swift_store(database: str, swift: SwiftPart, tmp_path: Path) -> None:
    (tmp_path / "user.key").write_text(swift.member_key)
    owner = {"ST_AUTH": swift.auth_url, "ST_USER": swift.user, "ST_KEY": swift.key}
    with serve(database, tmp_path) as broker:
        output = follow(GUIDES[1], tmp_path, broker, {"https://swift.example.org": swift.endpoint}, owner)
    for ability in ("multipart", "seals_parts", "copies", "refuses_tampering", "refuses_expired"):
        assert f"{ability}\tTrue" in output, "as with keys of the account"
    assert output.count("403 Forbidden") >= 5, output
    assert swift.key not in output
    assert swift.member_key not in output
