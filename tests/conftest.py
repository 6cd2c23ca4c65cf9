"""Fixtures that start real parts; each lives beside the part that it starts."""

pytest_plugins = [
    "tests.parts.postgres",
    "tests.parts.seaweedfs",
    "tests.parts.swift",
    "tests.parts.rclone",
    "tests.parts.storeside",
    "tests.parts.records",
    "tests.parts.desk",
    "tests.parts.broker",
]
