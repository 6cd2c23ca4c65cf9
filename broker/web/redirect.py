"""A download ticket for clients that know nothing of tickets: a redirect with its alternatives, or a Metalink.

Rules

- The answer renders the ticket that the same client would have got from POST /v1/tickets; nothing is decided here.
- Who names ``application/metalink4+xml`` in Accept gets RFC 5854, with the digests of pieces where the blob has them, so that a
  broken piece is fetched again from elsewhere. Who does not (``*/*`` names nothing) is sent to the best source, with each source in a
  Link field of its own (RFC 6249 section 3: ``rel=duplicate``, unquoted as aria2 wants it) and the digests of the whole (RFC 9530, and
  RFC 3230 for clients of RFC 6249).
- Sources that need header fields of their own are left out: a redirect carries none.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from multidict import CIMultiDict

METALINK = "application/metalink4+xml"
_NAMESPACE = "urn:ietf:params:xml:ns:metalink"

HASHES: Mapping[str, tuple[str, str]] = {"sha512": ("sha-512", "SHA-512"), "sha256": ("sha-256", "SHA-256"), "md5": ("md5", "MD5")}
"""Our names of digests, strongest first: IANA's for hash functions (Metalink, Repr-Digest), and those of RFC 3230."""

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


def wants_metalink(accept: str | None) -> bool:
    """Whether an Accept field (RFC 9110 section 12.5.1) names Metalink, and does not refuse it by ``q=0``."""
    for entry in (accept or "").split(","):
        media_type, *parameters = (part.strip().lower() for part in entry.split(";"))
        if media_type == METALINK:
            return not any(re.fullmatch(r"q\s*=\s*0(\.0*)?", parameter) for parameter in parameters)
    return False


def openable(ticket: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sources of a ticket that a bare URL opens, best first."""
    return [source for source in ticket["sources"] if not source["headers"]]


def redirect(sources: Sequence[Mapping[str, Any]], digests: Mapping[str, str]) -> CIMultiDict[str]:
    """Header fields of a 302 to the first of `sources` (at least one)."""
    fields = CIMultiDict[str]({"Location": sources[0]["url"], "Cache-Control": "no-store", "Vary": "Accept"})
    for priority, source in enumerate(sources, 1):
        fields.add("Link", f"<{source['url']}>; rel=duplicate; pri={priority}")
    known = [(names, base64.b64encode(bytes.fromhex(digests[ours])).decode()) for ours, names in HASHES.items() if ours in digests]
    if known:
        fields["Repr-Digest"] = ", ".join(f"{name}=:{value}:" for (name, _), value in known)
        fields["Digest"] = ",".join(f"{old_name}={value}" for (_, old_name), value in known)
    return fields


def metalink(sources: Sequence[Mapping[str, Any]], blob: Mapping[str, Any], name: str) -> bytes:
    """The same as RFC 5854. `blob` is what GET /v1/blobs/ID shows; `name` what the file is to be called."""
    root = ElementTree.Element("metalink", xmlns=_NAMESPACE)
    file = ElementTree.SubElement(root, "file", name=name)
    if blob["size"] is not None:
        ElementTree.SubElement(file, "size").text = str(blob["size"])
    for ours, (theirs, _) in HASHES.items():
        if ours in blob["digests"]:
            ElementTree.SubElement(file, "hash", type=theirs).text = blob["digests"][ours]
    pieces = blob.get("pieces")
    if pieces is not None and pieces["algorithm"] in HASHES:
        listed = ElementTree.SubElement(file, "pieces", length=str(pieces["length"]), type=HASHES[pieces["algorithm"]][0])
        for digest in pieces["digests"]:
            ElementTree.SubElement(listed, "hash").text = digest
    for priority, source in enumerate(sources, 1):
        ElementTree.SubElement(file, "url", priority=str(priority)).text = source["url"]
    return b'<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode").encode()


def file_name(name: str, format: str | None, otherwise: str) -> str:
    """A name for the file of an image that is safe in any directory: letters, digits, ``.``, ``_`` and ``-``, but not these first."""
    plain = _NOT_IN_NAMES.sub("_", name).strip("._-")[:200] or otherwise
    return plain if format is None or plain.lower().endswith(f".{format}") else f"{plain}.{format}"
