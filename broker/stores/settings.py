"""Reads the settings and the credential of a store, which administrators wrote, and tells when two of them are one place.

Texts name the entry, never its value.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from broker.errors import Invalid
from broker.model import CACHE, TOKENS, WEAK_UPLOADS, Store
from broker.sites import ancestors

_MANNER = ("region", "style", "digest", "audience", "segments_container", TOKENS, CACHE)
"""Settings that say how a place is spoken to, not where it is."""

_OF_EVERY_KIND: Mapping[str, tuple[str, str]] = {
    WEAK_UPLOADS: ("allowed", "refused"),
    TOKENS: ("trusted", "withheld"),
    CACHE: ("yes", "no"),
}
"""Settings that every kind has, with what they may be."""

_PORTS = {"http": 80, "https": 443}


def same_place(one: Store, other: Store) -> bool:
    """Whether two registrations keep their objects in the same place: one address in common, and the same bucket, container or prefix.

    One path is one place only where both sites are one, or one lies within the other: every machine has its own /var/lib.
    """
    if one.kind == "path" and one.site not in ancestors(other.site) and other.site not in ancestors(one.site):
        return False
    return (one.kind, _where(one)) == (other.kind, _where(other)) and not _addresses(one).isdisjoint(_addresses(other))


def _where(store: Store) -> dict[str, str]:
    return {name: value for name, value in store.settings.items() if value and name not in _MANNER}


def _addresses(store: Store) -> set[tuple[str | None, int | None, str]]:
    """Host, port and path: the same server may be there by http and https only on different ports."""
    found = set()
    for endpoint in filter(None, (store.endpoint, store.internal_endpoint)):
        with contextlib.suppress(ValueError):  # what is no address is refused when the store is opened
            parts = urlsplit(endpoint)
            found.add((parts.hostname, parts.port or _PORTS.get(parts.scheme), parts.path.rstrip("/")))
    return found


def check_names(store: Store, known: Collection[str]) -> None:
    """Raises `Invalid` for a setting that this kind of store does not know, or that no kind may have that value of."""
    known = {*known, *_OF_EVERY_KIND}
    for name, allowed in _OF_EVERY_KIND.items():
        if store.settings.get(name, allowed[0]) not in allowed:
            raise Invalid(
                f"store {store.name}: {name} is neither {' nor '.join(allowed)}", field=f"settings.{name}", expected=" or ".join(allowed)
            )
    for name in store.settings:
        if name not in known:
            raise Invalid(
                f"store {store.name}: a store of kind {store.kind} has no such setting",
                field=f"settings.{name[:64]}",
                expected="one of " + ", ".join(sorted(known)),
            )


def required(entries: Mapping[str, str], name: str, whose: str, field: str) -> str:
    """The entry `name`. Raises `Invalid` for `field` when it is missing or empty; `whose` begins the text."""
    value = entries.get(name)
    if not value:
        raise Invalid(f"{whose} has no {name}", field=field, expected=f"{name}: a text")
    return value


def number(entries: Mapping[str, str], name: str, whose: str) -> float | None:
    """The entry `name` as a number, or ``None`` without it. Raises `Invalid` when it is no number."""
    value = entries.get(name)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except ValueError:
        raise Invalid(f"{whose} has a {name} that is no number", field="credential", expected=f"{name}: POSIX seconds") from None
