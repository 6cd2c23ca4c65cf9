"""What clients ask before anything else: which versions of the API are spoken, and the schemas of what it holds.

Only versions whose operations work are told. Links are relative: clients resolve them against the address that they asked.
"""

from __future__ import annotations

from broker.web.call import Answer, Call
from broker.web.glance.documents import SCHEMAS

__all__ = [
    "glance_get_image_schema", "glance_get_images_schema", "glance_get_member_schema", "glance_get_members_schema", "glance_get_root",
    "glance_get_version", "glance_get_version_root", "glance_list_versions",
]  # fmt: skip

VERSIONS = ("2.18", "2.17", "2.14", "2.12", "2.11", "2.9", "2.8", "2.7", "2.5", "2.4", "2.3", "2.2", "2.1", "2.0")
"""Newest first (Images API reference, "API versions")."""


def _versions() -> dict[str, object]:
    link = {"rel": "self", "href": "/v2/"}
    return {
        "versions": [
            {"id": f"v{version}", "status": "CURRENT" if index == 0 else "SUPPORTED", "links": [link]}
            for index, version in enumerate(VERSIONS)
        ]
    }


async def glance_get_root(call: Call) -> Answer:
    return Answer(300, _versions())


async def glance_list_versions(call: Call) -> Answer:
    return Answer(200, _versions())


async def glance_get_version(call: Call) -> Answer:
    return Answer(200, _versions())


async def glance_get_version_root(call: Call) -> Answer:
    return Answer(200, _versions())


async def glance_get_image_schema(call: Call) -> Answer:
    return Answer(200, SCHEMAS["image"])


async def glance_get_images_schema(call: Call) -> Answer:
    return Answer(200, SCHEMAS["images"])


async def glance_get_member_schema(call: Call) -> Answer:
    return Answer(200, SCHEMAS["member"])


async def glance_get_members_schema(call: Call) -> Answer:
    return Answer(200, SCHEMAS["members"])
