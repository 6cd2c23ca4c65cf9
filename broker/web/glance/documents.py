"""The schemas that Glance serves below ``/v2/schemas``, which its clients read before they make or change anything.

They have the shape of the Images API reference, section "Schemas": names, descriptions and ``readOnly`` marks decide which options a
command line offers. What a request may hold is checked against the same documents (`broker.web.glance.attributes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Document = Mapping[str, Any]

DISK_FORMATS = ("ami", "ari", "aki", "vhd", "vhdx", "vmdk", "raw", "qcow2", "vdi", "iso", "ploop")
CONTAINER_FORMATS = ("ami", "ari", "aki", "bare", "ovf", "ova", "docker", "compressed")
"""Those that Glance knows unless its operator says otherwise."""

MAX_NAME = 255
MAX_VALUE = 16_384
"""Characters of a property's value: block device mappings of volumes are the longest in use."""

_NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
_NO_CONTROLS_BUT_LINES = r"^[^\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029]*$"
_MAX_NUMBER = (1 << 31) - 1
UUID_PATTERN = "^([0-9a-fA-F]){8}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){12}$"

PROPERTY_NAME: Document = {"type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": _NO_CONTROLS}
PROPERTY_VALUE: Document = {"type": "string", "maxLength": MAX_VALUE, "pattern": _NO_CONTROLS_BUT_LINES}
TAG: Document = {"type": "string", "minLength": 1, "maxLength": MAX_NAME, "pattern": _NO_CONTROLS}


def _told(type: str | list[str], description: str) -> Document:
    """What only the service sets."""
    return {"type": type, "readOnly": True, "description": description}


IMAGE_PROPERTIES: Document = {
    "id": {"type": "string", "description": "An identifier for the image", "pattern": UUID_PATTERN},
    "name": {
        "type": ["null", "string"],
        "description": "Descriptive name for the image",
        "maxLength": MAX_NAME,
        "pattern": _NO_CONTROLS,
    },
    "status": {
        **_told("string", "Status of the image"),
        "enum": [
            "queued", "saving", "active", "killed", "deleted", "uploading", "importing", "pending_delete", "deactivated",
        ],
    },
    "visibility": {
        "type": "string",
        "description": "Scope of image accessibility",
        "enum": ["community", "public", "private", "shared"],
    },
    "protected": {"type": "boolean", "description": "If true, image will not be deletable."},
    "os_hidden": {"type": "boolean", "description": "If true, image will not appear in default image list response."},
    "checksum": {**_told(["null", "string"], "md5 hash of image contents."), "maxLength": 32},
    "os_hash_algo": {**_told(["null", "string"], "Algorithm to calculate the os_hash_value"), "maxLength": 64},
    "os_hash_value": {
        **_told(["null", "string"], "Hexdigest of the image contents using the algorithm specified by the os_hash_algo"),
        "maxLength": 128,
    },
    "owner": {"type": ["null", "string"], "description": "Owner of the image", "maxLength": MAX_NAME, "pattern": _NO_CONTROLS},
    "size": _told(["null", "integer"], "Size of image file in bytes"),
    "virtual_size": _told(["null", "integer"], "Virtual size of image in bytes"),
    "container_format": {
        "type": ["null", "string"],
        "description": "Format of the container",
        "enum": [None, *CONTAINER_FORMATS],
    },
    "disk_format": {"type": ["null", "string"], "description": "Format of the disk", "enum": [None, *DISK_FORMATS]},
    "created_at": _told("string", "Date and time of image registration"),
    "updated_at": _told("string", "Date and time of the last image modification"),
    "tags": {"type": "array", "description": "List of strings related to the image", "items": TAG},
    "direct_url": _told("string", "URL to access the image file kept in external store"),
    "min_ram": {
        "type": "integer",
        "description": "Amount of ram (in MB) required to boot image.",
        "minimum": 0,
        "maximum": _MAX_NUMBER,
    },
    "min_disk": {
        "type": "integer",
        "description": "Amount of disk space (in GB) required to boot image.",
        "minimum": 0,
        "maximum": _MAX_NUMBER,
    },
    "self": _told("string", "An image self url"),
    "file": _told("string", "An image file url"),
    "stores": _told("string", "Stores in which image data resides, separated by commas."),
    "schema": _told("string", "An image schema url"),
    "locations": {
        "type": "array",
        "description": "A set of URLs to access the image file kept in external store",
        "items": {
            "type": "object",
            "properties": {
                "url": {"type": "string", "maxLength": 4096},
                "metadata": {"type": "object"},
                "validation_data": {
                    "description": "Values that the image's hashes must have, once its bytes are known",
                    "type": "object",
                    "writeOnly": True,
                    "additionalProperties": False,
                    "properties": {
                        "checksum": {"type": "string", "minLength": 32, "maxLength": 32},
                        "os_hash_algo": {"type": "string", "maxLength": 64},
                        "os_hash_value": {"type": "string", "maxLength": 128},
                    },
                    "required": ["os_hash_algo", "os_hash_value"],
                },
            },
            "required": ["url", "metadata"],
        },
    },
}  # fmt: skip
"""The attributes of an image; whatever has another name is a property of its own, a text."""

IMAGE: Document = {
    "name": "image",
    "properties": IMAGE_PROPERTIES,
    "additionalProperties": {"type": "string"},
    "links": [{"rel": "self", "href": "{self}"}, {"rel": "enclosure", "href": "{file}"}, {"rel": "describedby", "href": "{schema}"}],
}

MEMBER: Document = {
    "name": "member",
    "properties": {
        "member_id": {"type": "string", "description": "An identifier for the image member (tenantId)"},
        "image_id": {"type": "string", "description": "An identifier for the image", "pattern": UUID_PATTERN},
        "created_at": {"type": "string", "description": "Date and time of image member creation"},
        "updated_at": {"type": "string", "description": "Date and time of last modification of image member"},
        "status": {"type": "string", "description": "The status of this image member", "enum": ["pending", "accepted", "rejected"]},
        "schema": {"type": "string", "readOnly": True},
    },
    "additionalProperties": False,
}


def _collection(name: str, item: Document) -> Document:
    return {
        "name": name,
        "properties": {
            name: {"type": "array", "items": item},
            "first": {"type": "string"},
            "next": {"type": "string"},
            "schema": {"type": "string"},
        },
        "links": [{"rel": "first", "href": "{first}"}, {"rel": "next", "href": "{next}"}, {"rel": "describedby", "href": "{schema}"}],
    }


SCHEMAS: Mapping[str, Document] = {
    "image": IMAGE,
    "images": _collection("images", IMAGE),
    "member": MEMBER,
    "members": {
        "name": "members",
        "properties": {"members": {"type": "array", "items": MEMBER}, "schema": {"type": "string"}},
        "links": [{"rel": "describedby", "href": "{schema}"}],
    },
}
"""What ``/v2/schemas/NAME`` answers."""
