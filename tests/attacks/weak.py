"""What stores accept although they should not: each with its reason, and what the broker does about it. Nothing else may be accepted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Weakness:
    """Something that kinds of stores accept. `tries` are those of the attack that are meant."""

    kinds: tuple[str, ...]
    attack: str
    tries: frozenset[str]
    why: str
    broker: str
    """What the broker does about it."""


def weak(kinds: str, attack: str, tries: Iterable[str], why: str, broker: str) -> Weakness:
    return Weakness(tuple(kind.strip() for kind in kinds.split(",")), attack, frozenset(tries), why, broker)


STATED: tuple[Weakness, ...] = (
    weak(
        "Swift",
        "ticket to write used otherwise",
        ("HEAD of what it wrote",),
        "Swift's TempURLs for GET and PUT allow HEAD.",
        "It tells the uploader the size and MD5 of what he wrote himself, until the object is sealed under another key.",
    ),
    weak(
        "Swift",
        "length altered",
        ("longer", "shorter", "empty", "chunked and longer", "told in another header"),
        "A TempURL says nothing about the body.",
        "The probe finds no ``binds_length``: a commit compares the size that Swift tells, refuses what differs and deletes it.",
    ),
    weak(
        "Swift",
        "digest altered",
        ("headers left out", "headers replaced"),
        "A TempURL says nothing about the body; a client that leaves the ETag out gets through.",
        "The probe finds no ``binds_md5``: a commit needs the MD5 that Swift computed, and seals by a copy of just those bytes.",
    ),
    weak(
        "Swift",
        "prefix, name and inline added",
        ("filename", "inline"),
        "Swift does not sign them: they name the file that a browser saves, or have it shown.",
        "Nothing. Serve a store from a domain of its own, where a page has no rights.",
    ),
    weak(
        "SeaweedFS, rclone, Swift s3api",
        "used before its time",
        ("a minute", "20 minutes", "a day"),
        "They look at a URL's end only, not at its beginning.",
        "It signs no URL for later.",
    ),
    weak(
        "rclone",
        "signature re-encoded",
        ("with spaces", "with a line feed"),
        "It trims the signature; no other request is allowed by that.",
        "Nothing.",
    ),
    weak(
        "Swift s3api",
        "subresources by a URL to read",
        ("GET ?tagging", "GET ?tagging, first"),
        "It does not count the parameter as signed, and shows the object's tags.",
        "Objects of the broker have no tags.",
    ),
    weak(
        "Swift s3api",
        "parts of a finished upload",
        ("by tickets that bind nothing",),
        "A part lies on as an object of its own, which the part's URL overwrites: the joined object can no longer be read.",
        "The probe finds no ``seals_parts``: no upload goes there in parts; what is too large for one PUT is excluded as ``cannot-seal``.",
    ),
    weak(
        "SeaweedFS, rclone, Swift s3api",
        "PUT that says more",
        ("Content-Disposition", "Cache-Control"),
        "Headers that are not signed are kept and told to readers.",
        "They do not change the bytes. One with Content-Encoding would: a commit does not accept it.",
    ),
    weak(
        "storeside, aiohttp, ASGI, WSGI, nginx, HAProxy, Envoy, broker",
        "token spelled otherwise",
        ("s replaced by n - s",),
        "With every ECDSA signature anybody can compute a second one of the same message (FIPS 186-5 does not forbid it).",
        "It is the same token: its ``jti`` is signed, so it is used up, limited and revoked with the first spelling.",
    ),
    weak(
        "broker",
        "token spelled otherwise",
        ("padded",),
        "Bearer tokens are read by PyJWT, which takes a signature with base64's padding.",
        "It is the same token, and opens nothing more.",
    ),
    weak(
        "HAProxy, Envoy",
        "token spelled otherwise",
        ("zeros before r and s",),
        "Both numbers of the signature are read as long as they are.",
        "It is the same token, and opens nothing more.",
    ),
    weak(
        "Envoy",
        "token spelled otherwise",
        ("a byte more",),
        "What follows the signature's numbers is passed over.",
        "It is the same token, and opens nothing more.",
    ),
    weak(
        "Envoy",
        "parameters and headers twice",
        ("Host twice",),
        "It takes both for one name. A token does not speak of the host, so nothing more is opened.",
        "Tokens name the store by their audience.",
    ),
    weak(
        "Envoy",
        "claims of the wrong shape",
        ("exp far away",),
        "Any instant is one for it, however far away.",
        "It signs none later than the ticket's end; who has the signing key needs no such token.",
    ),
    weak(
        "broker",
        "audience altered",
        ("a list with the right one",),
        "An issuer may name several audiences (RFC 7519 section 4.1.3).",
        "The broker is one of those that the issuer meant. Transfer tokens name one store only.",
    ),
    weak(
        "aiohttp, ASGI, WSGI, nginx, HAProxy, Envoy",
        "single use",
        ("again", "again, s replaced by n - s", "again, in Authorization"),
        "Nothing remembers which tokens were used.",
        "An object is never overwritten; one that was deleted is looked for, and deleted again, until the URLs for it have ended.",
    ),
)


def stated(kind: str, attack: str) -> frozenset[str]:
    """The tries of an attack that this kind of store is stated to accept."""
    return frozenset().union(*(weakness.tries for weakness in STATED if kind in weakness.kinds and weakness.attack == attack))
