"""Fixtures that start real parts; each lives beside the part that it starts, but for those of parts that the demo starts as well."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.parts.seaweedfs import S3Part, start

pytest_plugins = [
    "tests.parts.postgres",
    "tests.parts.postgres_tls",
    "tests.parts.swift",
    "tests.parts.rclone",
    "tests.parts.keystone",
    "tests.parts.storeside",
    "tests.parts.records",
    "tests.parts.desk",
    "tests.parts.broker",
    "tests.parts.cluster",
    "tests.parts.nginx",
    "tests.parts.haproxy",
    "tests.parts.envoy",
]

# A run in the background of a shell script begins with interrupts ignored, and so would every command that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Part]:
    """SeaweedFS, shared by all tests of a session."""
    with start(tmp_path_factory.mktemp("seaweedfs")) as part:
        yield part


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what the attack table came to (tests/attacks), from whichever process it was carried out in."""
    reports = [*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())]
    columns = [value for report in reports for name, value in report.user_properties if name == "attacks"]
    if columns:
        cells, tries, accepted = map(sum, zip(*columns, strict=True))
        terminalreporter.write_line(
            f"attack table: {len(columns)} kinds of stores, {cells} attacks on them, {tries} tries, {accepted} accepted"
        )
