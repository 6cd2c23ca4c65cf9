"""git with git-lfs as people have them, cut off from the configuration of whoever runs the tests.

Git remotes are bare repositories on this disk: a broker is asked only for what git-lfs moves.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parts.process import find_program

SECONDS = 120.0


@dataclass(frozen=True)
class Git:
    """Runs git in `home`, with the token for the broker at `url` kept as a credential, as a user keeps a password, or sent in a header
    (`by_header`)."""

    home: Path
    url: str
    token: str
    by_header: bool = False

    def __post_init__(self) -> None:
        find_program("git", "apt-get install git")
        find_program("git-lfs", "apt-get install git-lfs")
        self.home.mkdir(parents=True, exist_ok=True)
        scheme, _, host = self.url.partition("://")
        self.run("config", "--global", "user.name", "Somebody")
        self.run("config", "--global", "user.email", "somebody@example.org")
        self.run("config", "--global", "init.defaultBranch", "main")
        self.run("lfs", "install", "--skip-repo")
        if self.by_header:
            self.run("config", "--global", f"http.{self.url}/.extraHeader", f"Authorization: Bearer {self.token}")
            return
        credentials = self.home / "credentials"
        credentials.write_text(f"{scheme}://token:{self.token}@{host}\n")
        credentials.chmod(0o600)
        self.run("config", "--global", "credential.helper", f"store --file={credentials}")

    def run(self, *arguments: str, at: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`git` with these arguments; its output holds what it said on both streams."""
        environment = {
            "PATH": os.environ["PATH"], "HOME": str(self.home), "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C",
        }  # fmt: skip
        done = subprocess.run(
            ["git", *arguments], cwd=at or self.home, env=environment, text=True, timeout=SECONDS, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"git {' '.join(arguments)}: {done.returncode}\n{done.stdout}"
        return done

    def begin(self, name: str, lfs_url: str, files: Mapping[str, bytes]) -> Path:
        """A work tree with one commit that tracks all ``*.bin`` by git-lfs, and a bare remote beside it, which is empty yet."""
        bare, tree = self.home / f"{name}.git", self.home / name
        self.run("init", "--bare", "--quiet", str(bare))
        self.run("init", "--quiet", str(tree))
        self.run("config", "--file", ".lfsconfig", "lfs.url", lfs_url, at=tree)
        self.run("lfs", "track", "*.bin", at=tree)
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_bytes(content)
        self.run("add", ".", at=tree)
        self.run("commit", "--quiet", "-m", "first", at=tree)
        self.run("remote", "add", "origin", str(bare), at=tree)
        return tree

    def clone(self, name: str, as_: str, *, check: bool = True) -> tuple[Path, subprocess.CompletedProcess[str]]:
        """A clone of what was pushed from `name` (a path, where it was begun in another home), and what git said."""
        tree = self.home / as_
        return tree, self.run("clone", "--quiet", str(self.home / f"{name}.git"), str(tree), check=check)


def held(tree: Path, paths: Sequence[str]) -> dict[str, bytes]:
    """What is in a work tree."""
    return {path: (tree / path).read_bytes() for path in paths}
