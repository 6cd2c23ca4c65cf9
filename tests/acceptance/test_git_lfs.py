"""Git LFS with the real git-lfs, over SeaweedFS and Swift: what it moves past the broker, and what it is told when something is wrong.

One broker and two stores for the whole file; each test has a repository of its own. Swift is behind a tap, so that it can die.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
import pytest_asyncio

from broker.model import Role
from broker.stores.base import Write
from broker.stores.http import HttpStore
from broker.web.lfs.objects import show
from tests.parts import traffic
from tests.parts.broker import Api, Reply
from tests.parts.cluster import SITE, Brokers, brokers_on, digests, ok, opened, register, s3_store, send
from tests.parts.git_lfs import Git, held
from tests.parts.postgres import Postgres
from tests.parts.records import storeside_record
from tests.parts.seaweedfs import S3Part
from tests.parts.storeside import StoresidePart
from tests.parts.swift import SwiftPart
from tests.parts.tap import Tap, tapped

MEDIA_TYPE = "application/vnd.git-lfs+json"
OBJECTS = 300
BYTES = 20_000
LARGE = 70_000_000
"""More than goes in one PUT where clients can do otherwise (``policy.uploads.single_put_limit``)."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Bed:
    """A broker with the stores ``weed`` and ``swift``."""

    brokers: Brokers
    session: aiohttp.ClientSession
    tap: Tap
    home: Path

    @property
    def url(self) -> str:
        return self.brokers.running[0].url

    @property
    def pid(self) -> int:
        return self.brokers.running[0].pid

    def api(self, role: Role | str = Role.MEMBER, project: str = "demo", subject: str = "alice") -> Api:
        return self.brokers.api(self.session, role, project=project, subject=subject)

    async def git(self, git: Git, *arguments: str, at: Path) -> str:
        return (await asyncio.to_thread(git.run, *arguments, at=at)).stdout

    async def change(self, store: str, **fields: Any) -> None:
        """Change a store; the broker that was told goes by it from then on."""
        admin = self.api(Role.ADMIN)
        found = await admin.get(f"/v1/stores/{store}")
        ok(await admin.patch(f"/v1/stores/{store}", fields, found.etag))


@pytest.fixture(scope="module")
def brokers(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Brokers]:
    with brokers_on(postgres.create(), tmp_path_factory.mktemp("git-lfs"), 1) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bed(brokers: Brokers, seaweedfs: S3Part, swift: SwiftPart, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bed]:
    async with aiohttp.ClientSession() as session, tapped(swift.endpoint) as tap:
        credential = brokers.credential("swift", {"access_key": swift.user, "secret_key": swift.key})
        swift_s3 = {
            "name": "swift", "kind": "s3", "site": SITE, "endpoint": tap.url, "credential": credential, "internal": True,
            "settings": {"bucket": swift.container},
        }  # fmt: skip
        await register(brokers, s3_store(brokers, seaweedfs), swift_s3)
        yield Bed(brokers, session, tap, tmp_path_factory.mktemp("homes"))


def contents(count: int, seed: str, size: int = BYTES) -> list[bytes]:
    source = random.Random(seed)
    return [source.randbytes(size) for _ in range(count)]


def named(content: bytes) -> dict[str, Any]:
    """A blob as a pointer file names it."""
    return {"oid": hashlib.sha256(content).hexdigest(), "size": len(content)}


async def batch(api: Api, operation: str, objects: Any, repository: str = "demo/table", **fields: Any) -> Reply:
    """What is answered to a batch of `objects`, right ones or wrong ones."""
    asked = orjson.dumps({"operation": operation, "transfers": ["basic"], "objects": objects, **fields})
    headers = {"Accept": MEDIA_TYPE, "Content-Type": MEDIA_TYPE}
    return await api.send("POST", f"/lfs/{repository}/objects/batch", raw=asked, headers=headers)


async def objects(reply: Reply, count: int) -> list[dict[str, Any]]:
    body = ok(reply)
    assert (body["transfer"], len(body["objects"])) == ("basic", count)
    found: list[dict[str, Any]] = body["objects"]
    return found


def place(shown: Mapping[str, Any], operation: str) -> dict[str, Any]:
    """An action as a place of a ticket."""
    action = shown["actions"][operation]
    return {"method": "PUT" if operation == "upload" else "GET", "url": action["href"], "headers": action.get("header", {})}


async def verify(api: Api, shown: Mapping[str, Any], repository: str = "demo/table") -> Reply:
    asked = {"oid": shown["oid"], "size": shown["size"]}
    return await api.send("POST", f"/lfs/{repository}/objects/verify", raw=orjson.dumps(asked), headers={"Content-Type": MEDIA_TYPE})


async def put(bed: Bed, api: Api, content: bytes, repository: str = "demo/table") -> None:
    """What git-lfs does for one object."""
    (shown,) = await objects(await batch(api, "upload", [named(content)], repository), 1)
    assert await send(bed.session, place(shown, "upload"), content) in (200, 201)
    ok(await verify(api, shown, repository))


# -- the real git-lfs


async def test_push_clone_and_clone_while_a_store_dies(bed: Bed) -> None:
    git = Git(bed.home / "home", bed.url, bed.brokers.token())
    files = {f"data/{number}.bin": content for number, content in enumerate(contents(OBJECTS, "files"))}
    tree = git.begin("work", f"{bed.url}/lfs/demo/work", files)
    before = traffic.carried(bed.pid)
    said = await bed.git(git, "push", "origin", "main", at=tree)
    pushed = traffic.carried(bed.pid)
    assert "main -> main" in said
    assert (sum(pushed) - sum(before)) // OBJECTS < 60_000, "words with the client, the stores and the database, whatever the size"

    clone, _ = await asyncio.to_thread(git.clone, "work", "again")
    assert held(clone, list(files)) == files
    cloned = traffic.carried(bed.pid)
    assert (sum(cloned) - sum(pushed)) // OBJECTS < 10_000

    large = random.Random("large").randbytes(LARGE)
    (tree / "large.bin").write_bytes(large)
    await bed.git(git, "add", ".", at=tree)
    await bed.git(git, "commit", "--quiet", "-m", "large", at=tree)
    before = traffic.carried(bed.pid)
    await bed.change("swift", write_slots=0)  # of what dies below, only what is copied first is anywhere else
    await bed.git(git, "push", "origin", "main", at=tree)
    await bed.change("swift", write_slots=None)
    await bed.git(git, "pull", "--quiet", "origin", "main", at=clone)
    assert held(clone, ["large.bin"]) == {"large.bin": large}
    assert sum(traffic.carried(bed.pid)) - sum(before) < 1_000_000

    copied = await copy_from_swift(bed, list(files.values()), "demo/work")
    assert copied >= 8
    other = Git(bed.home / "other", bed.url, bed.brokers.token(subject="bob"), by_header=True)  # who never asked for these before
    await bed.change("weed", cost=50)
    bed.tap.left["GET"] = copied // 4
    try:
        clone, told = await asyncio.to_thread(other.clone, str(git.home / "work"), "work")
        assert bed.tap.misbehaves == "cuts", "the store died in the middle"
    finally:
        bed.tap.left.clear()
        bed.tap.misbehaves = None
        await bed.change("weed", cost=0)
    assert held(clone, [*files, "large.bin"]) == {**files, "large.bin": large}, told.stdout
    assert not [fields for fields in bed.tap.fields if "Bearer" in fields.get("Authorization", "")], "no store sees the token"


async def test_push_while_a_store_dies(bed: Bed) -> None:
    """What was not put goes elsewhere, and so does what was put and cannot be looked at any more."""
    git = Git(bed.home / "pushing", bed.url, bed.brokers.token(subject="erin"))
    files = {f"data/{number}.bin": content for number, content in enumerate(contents(40, "dying"))}
    tree = git.begin("work", f"{bed.url}/lfs/demo/dying", files)
    await bed.change("weed", cost=50)
    bed.tap.left["PUT"] = 12
    try:
        await bed.git(git, "push", "origin", "main", at=tree)
        assert bed.tap.misbehaves == "cuts", "the store died in the middle"
    finally:
        bed.tap.left.clear()
        bed.tap.misbehaves = None
        await bed.change("weed", cost=0)
    clone, _ = await asyncio.to_thread(git.clone, "work", "again")
    assert held(clone, list(files)) == files


async def copy_from_swift(bed: Bed, files: Sequence[bytes], repository: str) -> int:
    """Put replicas on the other store of what lies on Swift; how many there are now."""
    api = bed.api(subject="helper")
    by_oid = {named(content)["oid"]: content for content in files}
    wanted: list[tuple[str, bytes]] = []
    for shown in await objects(await batch(api, "download", [named(content) for content in files], repository), len(files)):
        store, _, key = shown["actions"]["download"]["href"].partition("/images/")
        if store == bed.tap.url:
            wanted.append((key.partition("/")[0], by_oid[shown["oid"]]))

    async def copy(blob: str, content: bytes) -> None:
        said = {"size": len(content), "digests": digests(content)}
        ticket = ok(await api.post("/v1/tickets", {"operation": "upload", "blob": blob, "only": ["weed"], **said}), 201)
        assert await send(bed.session, ticket["destinations"][0], content) == 200
        ok(await api.post(f"/v1/tickets/{ticket['id']}/commit", said))

    for begin in range(0, len(wanted), 8):
        await asyncio.gather(*(copy(*each) for each in wanted[begin : begin + 8]))
    return len(wanted)


# -- what it is told


async def test_the_same_object_again_needs_nothing(bed: Bed) -> None:
    (content,) = contents(1, "known")
    api = bed.api()
    await put(bed, api, content)
    (again,) = await objects(await batch(api, "upload", [named(content)]), 1)
    assert again == named(content)
    (elsewhere,) = await objects(await batch(api, "upload", [named(content)], "demo/second"), 1)
    assert ("actions" in elsewhere) is not await proven(bed, api, content), "what a store has computed itself is known to who may read it"
    (foreign,) = await objects(await batch(bed.api(project="other"), "upload", [named(content)], "other/table"), 1)
    assert set(foreign["actions"]) == {"upload", "verify"}, "for others it is new"
    for repository in ("demo/table", "other/table"):
        (hidden,) = await objects(await batch(bed.api(project="other"), "download", [named(content)], repository), 1)
        assert hidden == {**named(content), "error": {"code": 404, "message": "No such object."}}


async def proven(bed: Bed, api: Api, content: bytes) -> bool:
    """Whether the object lies where the store computes a SHA-256."""
    (shown,) = await objects(await batch(api, "download", [named(content)]), 1)
    return not shown["actions"]["download"]["href"].startswith(bed.tap.url)


async def test_what_comes_is_what_was_put(bed: Bed) -> None:
    (content,) = contents(1, "bytes")
    api = bed.api()
    await put(bed, api, content)
    (shown,) = await objects(await batch(api, "download", [named(content)]), 1)
    assert (shown["authenticated"], set(shown["actions"])) == (True, {"download"})
    assert 0 < shown["actions"]["download"]["expires_in"] <= 3600
    async with opened(bed.session, place(shown, "download")) as response:
        assert await response.read() == content
    (reader,) = await objects(await batch(bed.api(Role.READER), "download", [named(content)]), 1)
    assert "actions" in reader
    (other_size,) = await objects(await batch(api, "download", [{**named(content), "size": 1}]), 1)
    assert other_size["error"]["code"] == 422
    images = ok(await api.get(f"/v1/images?name=table/{shown['oid']}"))["images"]
    assert [image["properties"] for image in images] == [{"lfs_repository": "table"}]
    ok(await api.delete(f"/v1/images/{images[0]['id']}", "*"))
    (gone,) = await objects(await batch(api, "download", [named(content)]), 1)
    assert gone["error"]["code"] == 404


@pytest.mark.parametrize("store", ["weed", "swift"])
async def test_other_bytes_are_refused_by_the_store_itself(bed: Bed, store: str) -> None:
    content, wrong = contents(2, f"wrong-{store}")
    api = bed.api()
    shown = await aimed(bed, api, content, store)
    assert await send(bed.session, place(shown, "upload"), wrong) == 400
    missing = await verify(api, shown)
    assert (missing.status, missing.body) == (404, {"message": "The object has not been uploaded."})
    assert await send(bed.session, place(shown, "upload"), content) == 200
    assert await send(bed.session, place(shown, "upload"), content) == 412, "sealed where it lies"
    ok(await verify(api, shown))
    ok(await verify(api, shown))
    (replica,) = await replicas(bed, shown["oid"])
    assert replica["observed"]["strength"] == {"weed": "sha256", "swift": "bound:sha256"}[store]


async def aimed(bed: Bed, api: Api, content: bytes, store: str) -> dict[str, Any]:
    """An upload of `content` that goes to `store`: while it is open, who asks again is sent elsewhere."""
    for _ in range(2):
        (shown,) = await objects(await batch(api, "upload", [named(content)]), 1)
        if (shown["actions"]["upload"]["href"].startswith(bed.tap.url)) is (store == "swift"):
            return shown
    raise AssertionError(f"twice not to {store}")


async def replicas(bed: Bed, oid: str) -> list[dict[str, Any]]:
    (image,) = ok(await bed.api().get(f"/v1/images?name=table/{oid}"))["images"]
    found: list[dict[str, Any]] = ok(await bed.api(Role.ADMIN).get(f"/v1/blobs/{image['blobs']['raw']['id']}/replicas"))["replicas"]
    return found


async def test_who_asks_again_is_sent_elsewhere(bed: Bed) -> None:
    first, second = contents(2, "again")
    api = bed.api()
    hrefs = []
    for _ in range(2):
        (shown,) = await objects(await batch(api, "upload", [named(first)]), 1)
        hrefs.append(shown["actions"]["upload"]["href"].startswith(bed.tap.url))
    assert sorted(hrefs) == [False, True]
    # What has arrived meanwhile is not asked for again, whether anyone said so or not.
    assert await send(bed.session, place(shown, "upload"), first) == 200
    (arrived,) = await objects(await batch(api, "upload", [named(first)]), 1)
    assert arrived == named(first)
    ok(await verify(api, arrived))

    shown = await aimed(bed, api, second, "swift")
    assert await send(bed.session, place(shown, "upload"), second) == 200
    ok(await verify(api, shown))
    assert await copy_from_swift(bed, [second], "demo/table") == 1
    hrefs = []
    for _ in range(2):
        (shown,) = await objects(await batch(bed.api(subject="carol"), "download", [named(second)]), 1)
        hrefs.append(shown["actions"]["download"]["href"].startswith(bed.tap.url))
    assert sorted(hrefs) == [False, True]


async def test_two_who_push_the_same_at_once(bed: Bed) -> None:
    files = contents(5, "twice")
    apis = [bed.api(subject="alice"), bed.api(subject="bob")]
    answers = await asyncio.gather(*(batch(api, "upload", [named(content) for content in files]) for api in apis))
    for api, answer in zip(apis, answers, strict=True):
        for shown, content in zip(await objects(answer, len(files)), files, strict=True):
            if "actions" in shown:
                assert await send(bed.session, place(shown, "upload"), content) == 200
                ok(await verify(api, shown))
    shown_again = await objects(await batch(apis[0], "upload", [named(content) for content in files]), len(files))
    assert all("actions" not in shown for shown in shown_again)


async def test_tokens_in_the_authorization_field(bed: Bed, storeside_part: StoresidePart) -> None:
    """Who gets 401 without such a field asks for ever."""
    store = HttpStore(storeside_record(storeside_part), storeside_part.signer, bed.session)
    now, key = time.time(), f"lfs-{time.time_ns()}"
    for operation, handle in (("upload", store.sign_put(Write(key, now + 60, 4), now)), ("download", store.sign_get(key, now + 60, now))):
        shown = show({"oid": "0" * 64, "size": 4}, handle, operation, "http://verify", now)
        body = b"abcd" if operation == "upload" else None
        async with opened(bed.session, place(shown, operation), data=body) as response:
            assert response.status in (200, 201)
            assert body or await response.read() == b"abcd"


async def test_full_stores(bed: Bed) -> None:
    """A lease holds back a whole batch, and one free slot lets in all of it."""
    files = contents(20, "full")
    api, names = bed.api(), [named(content) for content in files]
    for content in files[:2]:
        await put(bed, api, content)
    for store in ("weed", "swift"):
        await bed.change(store, read_slots=1, write_slots=1)
    try:
        (held_up,) = ok(await bed.api().get(f"/v1/images?name=table/{names[0]['oid']}"))["images"]
        ticket = ok(await api.post("/v1/tickets", {"operation": "download", "image": held_up["id"]}), 201)
        busy = await batch(bed.api(subject="dave"), "download", names[:1])
        assert busy.status == 429
        assert int(busy.headers["Retry-After"]) >= 1
        assert "Come again" in busy.body["message"]
        assert (await api.send("DELETE", f"/v1/tickets/{ticket['id']}")).status == 204
        (let_in,) = await objects(await batch(bed.api(subject="dave"), "download", names[:1]), 1)
        assert "actions" in let_in
        begun = await objects(await batch(api, "upload", names[2:]), 18)
        assert all("upload" in shown["actions"] for shown in begun), "one lease on each store is good for the batch"
        refused = await batch(bed.api(subject="bob"), "upload", [named(content) for content in contents(1, "late")])
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) >= 1
    finally:
        for store in ("weed", "swift"):
            await bed.change(store, read_slots=None, write_slots=None)
    for shown, content in zip(begun, files[2:], strict=True):
        assert await send(bed.session, place(shown, "upload"), content) == 200
        ok(await verify(api, shown))


async def test_no_room(bed: Bed) -> None:
    found = {store["name"]: store["reserved"] for store in ok(await bed.api(Role.ADMIN).get("/v1/stores"))["stores"]}
    for store, taken in found.items():
        await bed.change(store, capacity=taken + 10)
    try:
        shown = await objects(await batch(bed.api(), "upload", [named(content) for content in contents(3, "room")]), 3)
    finally:
        for store in found:
            await bed.change(store, capacity=None)
    assert {entry["error"]["code"] for entry in shown} == {507}


async def test_large_objects_go_in_one_put(bed: Bed) -> None:
    oid = hashlib.sha256(b"large").hexdigest()
    (largest, larger) = await objects(
        await batch(bed.api(), "upload", [{"oid": oid, "size": 5 << 30}, {"oid": oid[::-1], "size": (5 << 30) + 1}]), 2
    )
    assert largest["actions"]["upload"]["href"].count("X-Amz-Signature=") == 1
    assert "uploadId" not in largest["actions"]["upload"]["href"]
    assert larger["error"]["code"] == 413


async def test_how_many(bed: Bed) -> None:
    names = [{"oid": hashlib.sha256(str(number).encode()).hexdigest(), "size": 1} for number in range(1001)]
    shown = await objects(await batch(bed.api(), "download", names[:1000]), 1000)
    assert {entry["error"]["code"] for entry in shown} == {404}
    one_more = await batch(bed.api(), "download", names)
    assert (one_more.status, one_more.body["message"]) == (413, "Too many objects. (objects, expected: at most 1000)")
    assert (await batch(bed.api(), "upload", names * 10)).status == 413
    assert await objects(await batch(bed.api(), "download", []), 0) == []


GOOD = {"oid": "0" * 64, "size": 1}


@pytest.mark.parametrize(
    ("asked", "status", "word"),
    [
        ({"operation": "steal"}, 422, "operation"),
        ({"objects": None}, 422, "objects"),
        ({"objects": [{"oid": "0" * 64}]}, 422, "objects.0.size"),
        ({"objects": [{**GOOD, "size": "1"}]}, 422, "objects.0.size"),
        ({"objects": [{**GOOD, "size": 1.5}]}, 422, "objects.0.size"),
        ({"objects": [{**GOOD, "more": 1}]}, 422, "objects.0.more"),
        ({"objects": [{"oid": 7, "size": 1}]}, 422, "objects.0.oid"),
        ({"operation": "upload", "objects": [{"oid": "12345678", "size": 1}]}, 422, "objects.0.oid"),
        ({"operation": "upload", "objects": [{**GOOD, "size": -1}, {**GOOD, "size": 0}, {**GOOD, "size": 1 << 54}]}, 422, "size"),
        ({"transfers": ["tus", "ssh"]}, 422, "transfers"),
        ({"hash_algo": "sha512"}, 409, "hash_algo"),
    ],
)
async def test_batches_that_are_none(bed: Bed, asked: dict[str, Any], status: int, word: str) -> None:
    answer = await batch(bed.api(), **{"operation": "download", "objects": [GOOD], **asked})
    assert (answer.status, word in answer.body["message"]) == (status, True), answer.body


async def test_one_wrong_object_among_right_ones(bed: Bed) -> None:
    wrong = [{"oid": "../../etc/passwd", "size": 1}, {**GOOD, "size": -1}, {**GOOD, "size": 0}, {**GOOD, "size": 1 << 54}]
    (good,) = contents(1, "right")
    shown = await objects(await batch(bed.api(), "upload", [*wrong, named(good), named(good), {**named(good), "size": 5}]), 7)
    assert [entry.get("error", {}).get("code") for entry in shown] == [422, 422, 422, 422, None, None, 422]
    assert shown[4]["actions"] == shown[5]["actions"]


async def test_requests_that_are_none(bed: Bed) -> None:
    api, path = bed.api(), "/lfs/demo/table/objects/batch"
    body = orjson.dumps({"operation": "download", "objects": [GOOD], "ref": None, "new_in_some_version": True})

    async def status(path: str = path, method: str = "POST", raw: bytes = body, who: Api = api, **headers: str) -> int:
        sent = {"Content-Type": MEDIA_TYPE, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return (await who.send(method, path, raw=raw, headers=sent)).status

    assert await status() == 200
    assert await status(Content_Type=f"{MEDIA_TYPE}; charset=utf-8") == 200
    assert await status("/lfs/demo/table.git/info/lfs/objects/batch") == 200
    assert await status(Accept="text/html") == 406
    assert await status(Content_Type="text/plain") == 415
    assert await status(raw=b"{") == 400
    assert await status(raw=b" " * (1 << 20) + body) == 413
    assert await status("/lfs/demo/-x/objects/batch") == 422
    assert await status("/lfs/demo/%2e%2e/objects/batch") == 422
    assert await status("/lfs/%00/table/objects/batch") == 422
    assert await status("/lfs/%ff/table/objects/batch") == 400
    assert await status("/lfs/%C3%A9%2Fx/table/objects/batch") == 200, "no such project; its repositories are empty"
    for size in (1 << 63, 10**30, -(1 << 63)):
        assert await status(raw=b'{"operation":"download","objects":[{"oid":"%s","size":%d}]}' % (b"0" * 64, size)) in (200, 400, 422)
    assert await status("/lfs/demo/table/locks/verify", who=api.as_(None)) == 404
    assert await status("/lfs/demo/table/locks") == 404
    unknown = await api.as_(None).post(path, {"operation": "download", "objects": []})
    assert (unknown.status, unknown.headers["LFS-Authenticate"]) == (401, 'Basic realm="transfer-broker"')
    upload = orjson.dumps({"operation": "upload", "objects": [GOOD]})
    assert await status(raw=upload, who=bed.api(Role.READER)) == 403
    assert await status(raw=upload, who=bed.api(project="other")) == 404
    assert await status("/lfs/demo/table/objects/verify", raw=orjson.dumps(GOOD)) == 404
    assert await status("/lfs/demo/table/objects/verify", raw=orjson.dumps({**GOOD, "oid": "x"})) == 422
    for path, method in (("/lfs/demo/table/nothing", "GET"), ("/lfs/demo/objects/batch", "POST"), ("/lfs", "GET")):
        async with bed.session.request(method, bed.url + path) as response:
            assert (response.status, response.headers["Content-Type"]) == (404, MEDIA_TYPE)
            told = await response.json(content_type=None)
            assert (set(told), "/lfs/PROJECT/REPOSITORY" in told["message"]) == ({"message"}, True)
