"""Fixtures that start real parts; each lives beside the part that it starts, but for those of parts that the demo starts as well."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parts.seaweedfs import S3Part, start

pytest_plugins = [
    "tests.parts.postgres",
    "tests.parts.swift",
    "tests.parts.rclone",
    "tests.parts.storeside",
    "tests.parts.records",
    "tests.parts.desk",
    "tests.parts.broker",
    "tests.parts.cluster",
]


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Part]:
    """SeaweedFS, shared by all tests of a session."""
    with start(tmp_path_factory.mktemp("seaweedfs")) as part:
        yield part
