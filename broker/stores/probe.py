"""Finds out what a store really enforces, by trying it as a client would: with signed URLs, honest and dishonest ones.

Rules:

* Nothing is believed that was not seen here: documents, version headers and a store's name count for nothing.
* A binding counts only when a body that breaks it is refused, leaves nothing behind, is refused as well when the client leaves out
  the header that carries it, and the honest body is then accepted.
* A digest counts as observed only when the store told the right one, and never told a wrong one that a client had claimed.
* Everything happens under scratch keys that are removed at the end, whatever happens.
* Where the broker cannot look at all (`broker.stores.handed`) nothing is found, and nothing is believed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, Self, runtime_checkable

import aiohttp

from broker import model
from broker.errors import BrokerError, Invalid, StoreUnavailable
from broker.model import Abilities, Digests, Handle, PartSeen
from broker.stores.base import PartWrite, Store, Write
from broker.stores.handed import HandedStore
from broker.stores.visitor import Reply, Visitor

LIFE_SECONDS = 900.0
"""What a probe signs lives so long, the longest of what the broker signs for itself."""

_PAST_SECONDS = 120.0
_DIGESTS = ("sha512", "sha256", "md5")
"""What a store may tell of an object or a part, strongest first."""

_BINDING_HEADERS = frozenset(("content-md5", "etag", "x-amz-checksum-sha256", "if-none-match"))
_NOTHING = Abilities()
_ALL_OBSERVED = Abilities(observes=_DIGESTS, observes_parts=_DIGESTS)


class ProbeStep(NamedTuple):
    """One finding: what was tried, whether the store has it (``None``: could not be tried), and what was seen."""

    name: str
    result: bool | None
    detail: str


class Probed(NamedTuple):
    """What `probe` found."""

    abilities: Abilities
    steps: tuple[ProbeStep, ...]


@runtime_checkable
class Assuming(Protocol):
    """A store that can sign as if it had other abilities than it is registered with."""

    def assuming(self, abilities: Abilities) -> Self: ...


@runtime_checkable
class Forging(Protocol):
    """A store for which URLs can be made that no verifier may take, though each is almost right."""

    def forgeries(self, key: str, expires_at: float, now: float) -> Mapping[str, Handle]:
        """Handles that read `key`, by what is wrong with each."""
        ...


async def probe(store: Store, record: model.Store, session: aiohttp.ClientSession, now: float) -> Probed:
    """Try everything that `Abilities` speaks of, and clean up.

    `record` names the endpoints: what clients do goes to `record.endpoint`, or through the internal one under that name when the
    broker cannot reach it. Takes some twenty small requests and one part of the smallest size. Raises `StoreUnavailable` when the
    store cannot be reached or refuses even the first write, `Invalid` when stores of this kind cannot be probed.
    """
    if isinstance(store, HandedStore):
        return Probed(_NOTHING, (ProbeStep("looking", None, "the broker cannot open this kind of store: agents observe what lies there"),))
    if not isinstance(store, Assuming):
        raise Invalid(f"stores of kind {record.kind} cannot be probed", field="kind")
    visitor = Visitor(session, record)
    attempt = _Probe(store, visitor, now, f"probe-{secrets.token_hex(8)}")
    try:
        await attempt.run()
    finally:
        await attempt.clean()
    return Probed(attempt.abilities, tuple(attempt.steps))


@dataclass(slots=True)
class _Probe:
    """One run: what was found so far, and what must be removed."""

    store: Store
    visitor: Visitor
    now: float
    scratch: str
    abilities: Abilities = _NOTHING
    steps: list[ProbeStep] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    uploads: list[tuple[str, str]] = field(default_factory=list)
    lies: set[str] = field(default_factory=set)
    """Digests that the store repeated although they were wrong."""

    async def run(self) -> None:
        # These two fail as a whole: without an answer, or a right to write, there is nothing to find out.
        await self._clock()
        await self._write_and_read()
        if self.abilities.writes:
            await self._step("signature", self._signature)
            await self._step("expiry", self._expiry)
            await self._step("overwriting", self._overwriting)
            await self._step("unsized", self._unsized)
            await self._step("bound length", self._bound_length)
            await self._step("bound md5", lambda: self._bound_digest("md5"))
            await self._step("bound sha256", lambda: self._bound_digest("sha256"))
            await self._step("digests told", self._digests_told)
            await self._step("copying", self._copying)
            await self._step("multipart", self._multipart)
            await self._step("deleting", self._deleting)

    async def clean(self) -> None:
        """Remove all scratch objects and uploads; what cannot be removed now is named by its prefix for whoever looks."""
        for key, upload in self.uploads:
            with suppress(BrokerError):
                await self.store.abort(key, upload)
        left = 0
        for key in self.keys:
            try:
                await self.store.delete(key)
            except BrokerError:
                left += 1
        if left:
            self._found("clean-up", False, f"{left} scratch objects could not be removed; their keys begin with {self.scratch}")

    # --- bookkeeping ---

    async def _step(self, name: str, step: Callable[[], Awaitable[None]]) -> None:
        """Run one step; a store that fails in it lacks the ability, the other steps go on."""
        try:
            await step()
        except BrokerError as error:
            self._found(name, None, error.detail or error.title)

    def _found(self, name: str, result: bool | None, detail: str, **abilities: object) -> None:
        self.steps.append(ProbeStep(name, result, detail))
        self.abilities = replace(self.abilities, **abilities)  # type: ignore[arg-type]

    def _key(self, name: str) -> str:
        key = f"{self.scratch}-{name}"
        self.keys.add(key)
        return key

    def _as(self, abilities: Abilities) -> Store:
        assert isinstance(self.store, Assuming)
        return self.store.assuming(abilities)

    def _put_handle(self, key: str, abilities: Abilities, size: int | None = None, digests: Digests | None = None) -> Handle:
        write = Write(key, self.now + LIFE_SECONDS, size, digests or {}, {"probe": self.scratch})
        return self._as(abilities).sign_put(write, self.now)

    def _get_handle(self, key: str) -> Handle:
        return self.store.sign_get(key, self.now + LIFE_SECONDS, self.now)

    async def _holds(self, key: str, content: bytes) -> bool:
        return (await self.visitor.send(self._get_handle(key))).holds(content)

    # --- steps ---

    async def _clock(self) -> None:
        seconds = await self.store.clock_skew()
        self._found("clock", abs(seconds) < 300, f"{seconds:+.0f} s against the broker's", clock_skew_seconds=seconds)

    async def _write_and_read(self) -> None:
        content, key = secrets.token_bytes(3000), self._key("plain")
        put = await self.visitor.send(self._put_handle(key, _NOTHING, len(content)), content)
        self._found("writing", put.accepted, f"PUT: {put}", writes=put.accepted)
        if put.unreachable:
            raise StoreUnavailable(f"store {self.visitor.store} cannot be reached")
        if not put.accepted:
            return
        get = await self.visitor.send(self._get_handle(key))
        self._found("reading", get.holds(content), f"GET: {get}", reads=get.holds(content))
        part = await self.visitor.send(self._get_handle(key), headers={"Range": "bytes=1000-1999"})
        whole = part.status == 206 and part.body == content[1000:2000]
        self._found("ranges", whole, f"GET with Range: {part}, {len(part.body)} bytes", ranges=whole)

    async def _signature(self) -> None:
        """A URL for one key is no good for another, nor for another method, nor when a character of its signed part is changed."""
        mine, other, content = self._key("mine"), self._key("other"), secrets.token_bytes(100)
        for key in (mine, other):
            await self.visitor.send(self._put_handle(key, _NOTHING, len(content)), content)
        get = self._get_handle(mine)
        moved = await self.visitor.send(get._replace(url=get.url.replace(mine, other)))
        changed = await self.visitor.send(get._replace(url=_altered(get.url)))
        bare = await self.visitor.send(get._replace(url=get.url.partition("?")[0]))
        wrong = await self.visitor.send(get._replace(method="PUT"), b"wrong method")
        removed = await self.visitor.send(get._replace(method="DELETE"))
        forged = await self._forged(mine)
        writes = await self._unsigned_writes(other)
        intact = await self._holds(mine, content) and await self._holds(other, content)
        refused = intact and all(reply.refused for reply in (moved, changed, bare, wrong, removed, *forged, *writes))
        detail = f"another key: {moved}; altered: {changed}; unsigned: {bare}; PUT by a GET URL: {wrong}; DELETE by a GET URL: {removed}"
        self._found("signature", refused, detail, refuses_tampering=refused)

    async def _forged(self, key: str) -> list[Reply]:
        """What comes back to signatures that are wrong in ways which careless verifiers overlook."""
        if not isinstance(self.store, Forging):
            return []
        handles = self.store.forgeries(key, self.now + LIFE_SECONDS, self.now)
        replies = {name: await self.visitor.send(handle) for name, handle in handles.items()}
        refused = all(reply.refused for reply in replies.values())
        self._found("forged tokens", refused, "; ".join(f"{name}: {reply}" for name, reply in replies.items()))
        return list(replies.values())

    async def _unsigned_writes(self, key: str) -> list[Reply]:
        """What comes back to a PUT and a DELETE without a signature, and to a PUT by the URL for another key."""
        free = self._key("free")
        put, body = self._put_handle(self._key("taken"), _NOTHING, 100), secrets.token_bytes(100)
        bare = self._get_handle(key).url.partition("?")[0]
        unsigned = await self.visitor.send(Handle("PUT", bare, {}, put.expires_at), body)
        deleted = await self.visitor.send(Handle("DELETE", bare, {}, put.expires_at))
        moved = await self.visitor.send(put._replace(url=put.url.replace(self._key("taken"), free)), body)
        refused = all(reply.refused for reply in (unsigned, deleted, moved))
        self._found("unsigned writes", refused, f"PUT: {unsigned}; DELETE: {deleted}; PUT by the URL for another key: {moved}")
        return [unsigned, deleted, moved]

    async def _expiry(self) -> None:
        key = self._key("plain")
        end = self.now - _PAST_SECONDS / 2
        try:
            handle = self.store.sign_get(key, end, self.now)
        except StoreUnavailable:
            # S3 signs a lifetime, not an end: such a URL must have been made in the past.
            handle = self.store.sign_get(key, end, self.now - _PAST_SECONDS)
        late = await self.visitor.send(handle)
        write = await self._late_write(end)
        refused = late.refused and write.refused
        self._found("expiry", refused, f"GET after the end: {late}; PUT: {write}", refuses_expired=refused)

    async def _late_write(self, end: float) -> Reply:
        made = Write(self._key("late"), end, 100)
        try:
            handle = self._as(_NOTHING).sign_put(made, self.now)
        except StoreUnavailable:
            handle = self._as(_NOTHING).sign_put(made, self.now - _PAST_SECONDS)
        return await self.visitor.send(handle, secrets.token_bytes(100))

    async def _overwriting(self) -> None:
        key, first, second = self._key("once"), secrets.token_bytes(100), secrets.token_bytes(100)
        handle = self._put_handle(key, Abilities(refuses_overwrite=True))
        new = await self.visitor.send(handle, first)
        again = await self.visitor.send(handle, second)
        stripped = await self.visitor.send(_without_binding(handle), second)
        kept = new.accepted and again.refused and stripped.refused and await self._holds(key, first)
        detail = f"new: {new}; again: {again}; again without its header: {stripped}"
        self._found("refuses overwriting", kept, detail, refuses_overwrite=kept)

    async def _unsized(self) -> None:
        key, content = self._key("unsized"), secrets.token_bytes(100)
        put = await self.visitor.send(self._put_handle(key, _NOTHING), content, unsized=True)
        taken = put.accepted and await self._holds(key, content)
        self._found("takes bodies of unknown length", taken, f"PUT in chunks: {put}", takes_unsized=taken)

    async def _bound_length(self) -> None:
        key, honest = self._key("length"), secrets.token_bytes(100)
        handle = self._put_handle(key, Abilities(binds_length=True), len(honest))
        longer = await self.visitor.send(handle, honest + b"more")
        clean = longer.refused and await self.store.stat(key) is None
        right = await self.visitor.send(handle, honest)
        bound = clean and right.accepted
        self._found("binds length", bound, f"longer body: {longer}{_rest(longer, clean)}; right one: {right}", binds_length=bound)

    async def _bound_digest(self, algorithm: str) -> None:
        key, honest, lie = self._key(algorithm), secrets.token_bytes(100), secrets.token_bytes(100)
        binding = Abilities(binds_md5=True) if algorithm == "md5" else Abilities(binds_sha256=True)
        claimed = hashlib.new(algorithm, honest).hexdigest()
        handle = self._put_handle(key, binding, len(honest), {algorithm: claimed})
        wrong = await self.visitor.send(handle, lie)
        left = await self._as(_ALL_OBSERVED).stat(key)
        if left is not None and left.digests.get(algorithm) == claimed:
            self.lies.add(algorithm)
        stripped = await self.visitor.send(_without_binding(handle), lie)
        clean = left is None and stripped.refused and await self.store.stat(key) is None
        right = await self.visitor.send(handle, honest)
        bound = wrong.refused and clean and right.accepted
        detail = f"other body: {wrong}{_rest(wrong, left is None)}; without its header: {stripped}; right one: {right}"
        if algorithm in self.lies:
            detail += "; HEAD repeats the lie"
        self._found(f"binds {algorithm}", bound, detail, **{f"binds_{algorithm}": bound})

    async def _digests_told(self) -> None:
        """Of an object written without any claim, and of one written with a claim that the store enforces."""
        content, key = secrets.token_bytes(500), self._key("told")
        right = {name: hashlib.new(name, content).hexdigest() for name in _DIGESTS}
        await self.visitor.send(self._put_handle(key, _NOTHING, len(content)), content)
        told = set(await self._right_digests(key, right))
        if self.abilities.binds_sha256:
            key = self._key("told-bound")
            await self.visitor.send(self._put_handle(key, self.abilities, len(content), right), content)
            told.update(await self._right_digests(key, right))
        observes = tuple(name for name in _DIGESTS if name in told and name not in self.lies)
        self._found("tells digests", bool(observes), f"HEAD: {', '.join(observes) or 'none that it computes'}", observes=observes)

    async def _right_digests(self, key: str, right: Digests) -> list[str]:
        seen = await self._as(_ALL_OBSERVED).stat(key)
        if seen is None:
            return []
        self.lies.update(name for name, value in seen.digests.items() if value != right[name])
        return [name for name, value in seen.digests.items() if value == right[name]]

    async def _copying(self) -> None:
        staging, final, content = self._key("staged"), self._key("sealed"), secrets.token_bytes(100)
        handle = self._put_handle(staging, _NOTHING, len(content))
        await self.visitor.send(handle, content)
        place = await self._as(_NOTHING).seal(staging, final, {})
        if place != final:
            self._found("copies", False, "sealing moves nothing here")
            return
        moved = await self.store.stat(staging) is None and await self._holds(final, content)
        await self.visitor.send(handle, secrets.token_bytes(100))
        kept = await self._holds(final, content)
        self._found("copies", moved and kept, "a staged object was sealed under another key", copies=moved and kept)

    async def _multipart(self) -> None:
        key, size = self._key("parts"), self.store.limits.min_part
        bodies = (secrets.token_bytes(size), secrets.token_bytes(100))
        observing = self._as(replace(_ALL_OBSERVED, refuses_overwrite=self.abilities.refuses_overwrite))
        upload = await self.store.begin(key, size + 100, size, {"probe": self.scratch})
        self.uploads.append((key, upload))
        handles = [self._part_handle(key, upload, number, bodies, bound=True) for number in (1, 2)]
        loose = self._part_handle(key, upload, 2, bodies, bound=False)
        wrong = await self.visitor.send(handles[1], secrets.token_bytes(len(bodies[1])))
        self._found("binds digests of parts", wrong.refused, f"other body: {wrong}")
        sent = [await self.visitor.send(handle, body) for handle, body in zip(handles, bodies, strict=True)]
        seen = await observing.parts(key, upload)
        complete = [part.size for part in seen] == [len(body) for body in bodies]
        if not all(reply.accepted for reply in sent) or not complete:
            self._found("multipart", False, f"parts: {sent[0]}, {sent[1]}; listed: {[part.size for part in seen]}")
            return
        observes = tuple(name for name in _DIGESTS if all(_right(part, name, body) for part, body in zip(seen, bodies, strict=True)))
        self._found("tells digests of parts", bool(observes), ", ".join(observes) or "none", observes_parts=observes)
        final = await observing.finish(key, upload, seen, {"probe": self.scratch})
        self.keys.add(final)
        whole = await self._holds(final, b"".join(bodies))
        self._found("multipart", whole, f"two parts were joined: {'bytes equal' if whole else 'other bytes'}", multipart=whole)
        await self._right_digests(final, {name: hashlib.new(name, b"".join(bodies)).hexdigest() for name in _DIGESTS})
        self.abilities = replace(self.abilities, observes=tuple(name for name in self.abilities.observes if name not in self.lies))
        # By a URL that binds no digest, and with the same length, so that no store can refuse it for that alone.
        replay = await self.visitor.send(loose, secrets.token_bytes(100))
        sealed = whole and await self._holds(final, b"".join(bodies))
        detail = f"a part sent again afterwards: {replay}; the object is {'unchanged' if sealed else 'BROKEN'}"
        self._found("seals parts", sealed, detail, seals_parts=sealed)

    def _part_handle(self, key: str, upload: str, number: int, bodies: tuple[bytes, bytes], *, bound: bool) -> Handle:
        offset = 0 if number == 1 else len(bodies[0])
        body = bodies[number - 1]
        digests = {name: hashlib.new(name, body).hexdigest() for name in _DIGESTS} if bound else {}
        part = PartWrite(number, offset, len(body), self.now + LIFE_SECONDS, digests)
        return self._as(self.abilities).sign_part(key, upload, part, self.now)

    async def _deleting(self) -> None:
        key = self._key("plain")
        removed = await self.store.delete(key) and await self.store.stat(key) is None
        again = await self.store.delete(key)
        self._found("deletes", removed and not again, "an object was removed" if removed else "the object is still there", deletes=removed)


def _altered(url: str) -> str:
    """`url` with one character near its end changed: there stand the end of an S3 signature or of a token, or a TempURL's expiry."""
    return url[:-10] + ("3" if url[-10] == "2" else "2") + url[-9:]


def _right(part: PartSeen, algorithm: str, body: bytes) -> bool:
    return part.digests.get(algorithm) == hashlib.new(algorithm, body).hexdigest()


def _without_binding(handle: Handle) -> Handle:
    """The handle as a dishonest client uses it: without the headers that bind."""
    return handle._replace(headers={name: value for name, value in handle.headers.items() if name.lower() not in _BINDING_HEADERS})


def _rest(reply: Reply, clean: bool) -> str:
    return " but left something behind" if reply.refused and not clean else ""
