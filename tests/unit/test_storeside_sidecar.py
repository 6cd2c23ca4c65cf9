"""The keys as files: what is written for which keys, when the front is reloaded, and that doubt ends in an empty set."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from broker.sign.token import SigningKey, generate_key, jwks, to_pem
from broker.storeside import sidecar
from broker.storeside.jwks import KeySource
from broker.storeside.sidecar import Mirror, files_of
from broker.storeside.verify import keys_of

ES, RS, ED = (generate_key(algorithm, 0) for algorithm in ("ES256", "RS256", "EdDSA"))  # type: ignore[arg-type]
OTHER = generate_key("ES256", 0)
FIXED = {"haproxy.cfg", "pem.map", "algorithm.map", "jwks.json"}


class Front:
    """Counts how often it was reloaded, and may refuse."""

    def __init__(self) -> None:
        self.reloads = 0
        self.works = True

    async def reload(self) -> bool:
        self.reloads += 1
        return self.works


class Bed:
    """An issuer (a file), a directory, and a front."""

    def __init__(self, place: Path, keep: float = 3600) -> None:
        self.issuer = place / "issuer.json"
        self.directory = place / "keys"
        self.directory.mkdir()
        self.front = Front()
        self.keep = keep
        self.mirror = self.restarted()

    def restarted(self) -> Mirror:
        source = KeySource(str(self.issuer), keep_seconds=self.keep)
        return Mirror(source, self.directory, self.keep, self.front.reload)

    def publish(self, *keys: SigningKey) -> None:
        self.issuer.write_text(json.dumps(jwks(keys)))

    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir() if not path.name.startswith(".")}

    def pems(self) -> set[str]:
        return {name.removesuffix(".pem") for name in self.files() - FIXED}

    def published(self) -> list[str]:
        return [key["kid"] for key in json.loads((self.directory / "jwks.json").read_text())["keys"]]

    def age(self, seconds: float) -> None:
        """Let the last reading be so long ago."""
        then = time.time() - seconds
        os.utime(self.directory / "jwks.json", (then, then))


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return Bed(tmp_path)


def ids(keys: Iterable[SigningKey]) -> set[str]:
    return {key.id for key in keys}


def test_every_kind_of_key_becomes_a_file() -> None:
    keys = keys_of(jwks([ES, RS, ED]))
    files = files_of(keys, Path("/run/keys"))
    for key in (ES, RS, ED):
        assert load_pem_public_key(files[f"{key.id}.pem"]) == key.private.public_key()
    again = keys_of(json.loads(files["jwks.json"]))
    assert again.keys() == keys.keys()
    for kid, key in again.items():
        assert (key.algorithm_name, key.key) == (keys[kid].algorithm_name, keys[kid].key)
    assert list(files)[-1] == "jwks.json"  # its age counts: only when all is there


def test_haproxy_is_told_of_what_it_can_verify() -> None:
    files = files_of(keys_of(jwks([ES, RS, ED])), Path("/run/keys"))
    assert dict(line.split() for line in files["pem.map"].decode().splitlines()) == {key.id: f"/run/keys/{key.id}.pem" for key in (ES, RS)}
    assert dict(line.split() for line in files["algorithm.map"].decode().splitlines()) == {ES.id: "ES256", RS.id: "RS256"}
    assert ED.id not in files["haproxy.cfg"].decode()
    assert files["haproxy.cfg"].decode().count("jwt_verify(") == 2


@pytest.mark.parametrize("kid", ["../../etc/passwd", "a/b", "", "a b", ".hidden", "a" * 129, "a\nb", "é", 'a"b'])
def test_an_id_that_is_no_file_name_is_left_out(kid: str) -> None:
    document = {"keys": [{**jwks([ES])["keys"][0], "kid": kid}, *jwks([RS])["keys"]]}
    files = files_of(keys_of(document), Path("/run/keys"))
    assert files.keys() == {f"{RS.id}.pem", *FIXED}


async def test_keys_come_and_go_and_the_front_is_reloaded_when_they_do(bed: Bed) -> None:
    bed.publish(ES, RS)
    assert await bed.mirror.round()
    assert bed.pems() == ids([ES, RS]) == set(bed.published())
    assert bed.front.reloads == 1
    for path in bed.directory.iterdir():
        if not path.name.startswith("."):
            assert stat.S_IMODE(path.stat().st_mode) == 0o644

    written = {name: (bed.directory / name).stat().st_ino for name in bed.files()}
    assert await bed.mirror.round()
    assert {name: (bed.directory / name).stat().st_ino for name in bed.files()} == written
    assert bed.front.reloads == 1

    bed.publish(RS, OTHER)
    assert await bed.mirror.round()
    assert bed.pems() == ids([RS, OTHER]) == set(bed.published())
    assert bed.front.reloads == 2
    assert not [path for path in bed.directory.iterdir() if path.name.endswith(".new")]


async def test_what_others_keep_there_stays(bed: Bed) -> None:
    (bed.directory / "tls.pem").write_bytes(to_pem(ES, b"passphrase"))
    (bed.directory / "old.pem").write_bytes(files_of(keys_of(jwks([OTHER])), bed.directory)[f"{OTHER.id}.pem"])
    bed.publish(ES)
    assert await bed.mirror.round()
    assert bed.pems() == {ES.id, "tls"}


@pytest.mark.parametrize("text", ["", "{", "[]", "<html>", '{"keys": 1}'])
async def test_rubbish_changes_nothing(bed: Bed, text: str) -> None:
    bed.publish(ES)
    await bed.mirror.round()
    bed.issuer.write_text(text)
    assert not await bed.mirror.round()
    assert not await bed.restarted().round()
    assert bed.published() == [ES.id]
    assert bed.front.reloads == 1


async def test_an_empty_set_is_believed_at_once(bed: Bed) -> None:
    bed.publish(ES)
    await bed.mirror.round()
    bed.publish()
    assert await bed.mirror.round()
    assert (bed.pems(), bed.published(), bed.front.reloads) == (set(), [], 2)


@pytest.mark.parametrize("restart", [False, True])
async def test_without_the_issuer_keys_are_kept_for_so_long_and_no_longer(bed: Bed, restart: bool) -> None:
    bed.publish(ES)
    await bed.mirror.round()
    bed.issuer.unlink()
    mirror = bed.restarted() if restart else bed.mirror
    bed.age(bed.keep - 60)
    assert not await mirror.round()
    assert bed.published() == [ES.id]
    bed.age(bed.keep + 1)
    assert not await mirror.round()
    assert (bed.pems(), bed.published(), bed.front.reloads) == (set(), [], 2)
    assert not await mirror.round()
    assert bed.front.reloads == 2
    bed.publish(ES)
    assert await mirror.round()
    assert (bed.pems(), bed.front.reloads) == ({ES.id}, 3)


async def test_an_age_in_the_future_is_not_believed(bed: Bed) -> None:
    bed.publish(ES)
    await bed.mirror.round()
    bed.issuer.unlink()
    bed.age(-86_400)
    assert not await bed.restarted().round()
    assert bed.published() == []


async def test_a_front_can_start_before_the_keys_were_ever_read(bed: Bed) -> None:
    assert not await bed.mirror.round()
    assert bed.files() == FIXED
    assert bed.published() == []


async def test_a_reload_that_failed_is_tried_again(bed: Bed) -> None:
    bed.publish(ES)
    bed.front.works = False
    assert not await bed.mirror.round()
    assert not await bed.mirror.round()
    assert bed.front.reloads == 2
    bed.front.works = True
    assert await bed.restarted().round()  # after a crash too
    assert await bed.mirror.round()
    assert bed.front.reloads == 3


async def test_two_that_write_one_directory_leave_it_whole(bed: Bed) -> None:
    mirrors = [bed.restarted() for _ in range(4)]
    for turn in range(6):
        bed.publish(*((ES, RS) if turn % 2 else (OTHER,)))
        await asyncio.gather(*(mirror.round() for mirror in mirrors))
        assert bed.pems() == set(bed.published()) == ids((ES, RS) if turn % 2 else (OTHER,))


@pytest.mark.parametrize(("code", "works"), [("pass", True), ("raise SystemExit(3)", False)])
async def test_a_command_tells_whether_it_worked(code: str, works: bool) -> None:
    assert await sidecar.by_command([sys.executable, "-c", code])() is works


async def test_a_command_that_is_not_there_or_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not await sidecar.by_command(["/nowhere/nginx", "-s", "reload"])()
    monkeypatch.setattr(sidecar, "RELOAD_SECONDS", 0.2)
    assert not await sidecar.by_command([sys.executable, "-c", "import time; time.sleep(600)"])()


@pytest.mark.parametrize(
    ("text", "works"), [(None, True), ("999999999", True), ("", False), ("nginx", False), ("0", False), ("-1", False), ("1", False)]
)
async def test_a_process_id_that_is_none(tmp_path: Path, text: str | None, works: bool) -> None:
    file = tmp_path / "pid"
    if text is not None:
        file.write_text(text)
    assert await sidecar.by_signal(file, signal.SIGHUP)() is works


async def test_the_process_is_signalled(tmp_path: Path) -> None:
    came = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, came.set)
    try:
        (tmp_path / "pid").write_text(f"{os.getpid()}\n")
        assert await sidecar.by_signal(tmp_path / "pid", signal.SIGUSR2)()
        async with asyncio.timeout(60):
            await came.wait()
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGUSR2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--reload", "true", "--pid-file", "x"], "exclude each other"),
        (["--signal", "BOO"], "signal's name"),
        (["--reload", ""], "must be a command"),
        (["--reload", "nginx '"], "No closing quotation"),
        (["--refresh", "0"], "range"),
        (["--keep", "0.5"], "range"),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], says: str) -> None:
    made = CliRunner().invoke(sidecar.main, ["--jwks", "x", "--directory", str(tmp_path), *options])
    assert made.exit_code == 2
    assert says in made.output


def test_a_directory_that_haproxy_could_not_name(tmp_path: Path) -> None:
    made = CliRunner().invoke(sidecar.main, ["--jwks", "x", "--directory", str(tmp_path / 'a "b"')])
    assert made.exit_code == 2
    assert "letters, digits" in made.output


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = CliRunner().invoke(sidecar.main, ["--jwks", "x", "--directory", str(tmp_path / "file" / "keys"), "--once"])
    assert made.exit_code == 1
    assert "cannot be written" in made.output
