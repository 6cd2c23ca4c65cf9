"""The status page over HTTP: who sees what, how a browser signs in, and what names are made of."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from broker import errors
from broker.catalog import status as readings
from broker.model import Principal, Role, new_id
from broker.service import status as service
from broker.sign.token import TokenSigner, generate_key, jwks
from broker.web.status.pages import is_own_form
from broker.web.status.session import Sessions
from tests.parts.broker import Api, RunningBroker, broker_on

HTML = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
ABILITIES = {"reads": True, "writes": True, "observes": ["sha256"]}
S3 = {"access_key": "AKIDTEST", "secret_key": "not-very-secret"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'


@dataclass(frozen=True)
class Page:
    """An answer for a browser."""

    status: int
    headers: Mapping[str, str]
    html: str

    @property
    def text(self) -> str:
        """Without markup, blanks folded."""
        return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", self.html.partition("</style>")[2]))


@dataclass
class Desk:
    """A broker with stores that nobody talks to, and browsers."""

    broker: RunningBroker
    session: aiohttp.ClientSession

    @property
    def db(self) -> Any:
        return self.broker.context.db

    async def store(self, name: str, *, site: str = "eu/az1", slots: int | None = None, exposure: str = "public") -> int:
        id = await self.db.fetchval(
            """INSERT INTO stores (name, kind, site, endpoint, settings, credential, abilities, exposure)
               VALUES ($1, 's3', $2, $3, '{"bucket": "b"}', 's3', $4, $5) RETURNING id""",
            name, site, f"https://{name}.example", ABILITIES, exposure,
        )  # fmt: skip
        await self.db.execute("INSERT INTO slots (store_id, direction, slots) VALUES ($1, 'read', $2), ($1, 'write', NULL)", id, slots)
        await self.db.execute("INSERT INTO spaces (store_id, capacity, taken) VALUES ($1, 1000000000000, 250000000000)", id)
        await self.broker.context.memory.reload_stores()
        return int(id)

    async def image(self, *stores: int, name: str = "debian", project: str = "owner", size: int = 5 << 20) -> str:
        """A public image with a replica on each store; its id."""
        blob, image = new_id(), new_id()
        await self.db.execute("INSERT INTO blobs (id, size, state) VALUES ($1, $2, 'active')", blob, size)
        for store in stores:
            await self.db.execute(
                """INSERT INTO replicas (id, blob_id, store_id, key, state, project, subject, observed_by, observed_strength, observed_at)
                   VALUES ($1, $2, $3, $4, 'active', 'o', 'u', 'broker', 'md5', now())""",
                new_id(), blob, store, f"{blob}/{store}",
            )  # fmt: skip
        await self.db.execute(
            "INSERT INTO images (id, name, project, subject, visibility, status) VALUES ($1, $2, $3, 'u', 'public', 'active')",
            image, name, project,
        )  # fmt: skip
        await self.db.execute("INSERT INTO image_blobs VALUES ($1, 'raw', $2)", image, blob)
        return str(image)

    async def ask(self, image: str, role: str = "member", project: str = "demo", subject: str = "alice", **more: str) -> dict[str, Any]:
        """A ticket for an image."""
        api = Api(self.broker.url, self.session, self.broker.token(role, project, subject))
        reply = await api.post("/v1/tickets", {"operation": "download", "image": image}, **more)
        assert reply.status == 201, reply.body
        return dict(reply.body)

    async def report(self, ticket: Mapping[str, Any], outcome: str = "ok", project: str = "demo", subject: str = "alice") -> None:
        """How its first place did."""
        api = Api(self.broker.url, self.session, self.broker.token("member", project, subject))
        body = {"store": ticket["sources"][0]["store"], "outcome": outcome, "bytes": 5 << 20, "seconds": 0.02}
        assert (await api.post(f"/v1/tickets/{ticket['id']}/report", body)).status == 204

    async def get(self, path: str = "/", **headers: str) -> Page:
        return await self.send("GET", path, headers=headers)

    async def see(self, role: str, project: str = "demo", subject: str = "alice", path: str = "/") -> Page:
        """The page for somebody who comes with a token."""
        page = await self.get(path, Authorization=f"Bearer {self.broker.token(role, project, subject)}")
        assert page.status == 200, page.text
        return page

    async def sign_in(self, token: str, **headers: str) -> Page:
        return await self.post({"token": token}, **headers)

    async def post(self, form: Mapping[str, str], **headers: str) -> Page:
        return await self.send("POST", "/", data=form, headers=headers)

    async def send(self, method: str, path: str, *, headers: Mapping[str, str], data: Any = None) -> Page:
        sent = {**HTML, **{name.replace("_", "-"): value for name, value in headers.items()}}
        url = self.broker.url + path
        async with self.session.request(method, url, data=data, headers=sent, allow_redirects=False) as response:
            return Page(response.status, response.headers, await response.text())


@pytest.fixture
async def desk(database: str, tmp_path: Path) -> AsyncIterator[Desk]:
    async with broker_on(database, tmp_path) as broker, aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        broker.credential("s3", S3)
        for site in ("eu/az1", "eu/az2", "vault"):
            await broker.context.db.execute("INSERT INTO sites (path) VALUES ($1)", site)
        yield Desk(broker, session)


def cookie_of(page: Page) -> str:
    """What a browser sends back."""
    found = SimpleCookie(page.headers["Set-Cookie"])
    ((name, morsel),) = found.items()
    return f"{name}={morsel.value}"


# -- nobody


async def test_who_is_unknown_sees_a_form_and_nothing_else(desk: Desk) -> None:
    await desk.store("disk-1")
    page = await desk.get()
    assert page.status == 401
    assert page.headers["WWW-Authenticate"].startswith("Bearer")
    assert '<input id="token" name="token" type="password"' in page.html
    for secret in ("disk-1", "eu/az1", "Stores", "Keystone"):
        assert secret not in page.html


async def the_place_stays_free_for_others_than_browsers(desk: Desk) -> None:
    for accept in ("*/*", "application/json", "application/json, text/html;q=0", "text/html ;q=0.0, */*", ""):
        page = await desk.get(Accept=accept)
        assert (page.status, page.headers["Content-Type"]) == (300, "application/json"), accept  # the versions of Glance
    for accept in ("text/html", "application/json;q=0.1, Text/HTML;level=1;q=0.5", "a/b,text/html"):
        assert (await desk.get(Accept=accept)).status == 401, accept


async def every_answer_is_bare_of_scripts_frames_and_caches(desk: Desk) -> None:
    pages = [await desk.get(), await desk.see("admin"), await desk.sign_in("x"), await desk.sign_in(desk.broker.token("admin"))]
    for page in pages:
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert page.headers["Cache-Control"] == "no-store"
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert not re.search(r"<script|\son\w+=|javascript:|style=|https?://(?!www\.w3\.org/2000/svg)", page.html)


# -- signing in and out


async def signing_in_with_a_token_opens_the_page_for_an_hour(desk: Desk) -> None:
    token = desk.broker.token("admin")
    signed = await desk.sign_in(token)
    assert (signed.status, signed.headers["Location"]) == (303, "/")
    field = signed.headers["Set-Cookie"]
    assert "; Max-Age=36" in field or "; Max-Age=35" in field
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(field.split("; "))
    assert "Secure" not in field  # this one is reached by plain HTTP
    assert token not in field
    page = await desk.get(Cookie=cookie_of(signed))
    assert page.status == 200
    assert "alice , project demo , role admin" in page.text
    assert "Sign out" in page.text


async def a_session_never_outlives_its_token(desk: Desk) -> None:
    field = (await desk.sign_in(desk.broker.token("admin", ttl=100))).headers["Set-Cookie"]
    assert 90 <= int(re.findall(r"Max-Age=(\d+)", field)[0]) <= 100


async def a_session_is_good_for_the_page_only(desk: Desk) -> None:
    cookie = cookie_of(await desk.sign_in(desk.broker.token("admin")))
    value = cookie.partition("=")[2]
    for headers in ({"Cookie": cookie}, {"Authorization": f"Bearer {value}"}, {"X-Auth-Token": value}):
        for path in ("/v1/stores", "/v1/images", "/v1/keys"):
            async with desk.session.get(desk.broker.url + path, headers=headers) as response:
                assert response.status == 401
    assert (await desk.get(Authorization=f"Bearer {value}")).status == 401


async def a_token_in_the_cookie_or_the_url_opens_nothing(desk: Desk) -> None:
    token = desk.broker.token("admin")
    assert (await desk.get(Cookie=f"broker-status={token}")).status == 401
    assert (await desk.get(f"/?token={token}")).status == 401


async def a_session_altered_or_given_twice_is_none(desk: Desk) -> None:
    cookie = cookie_of(await desk.sign_in(desk.broker.token("reader")))
    name, _, value = cookie.partition("=")
    head, body, signature = value.split(".")
    assert (await desk.get(Cookie=cookie)).status == 200
    for wrong in (
        f"{head}.{body}.",
        f"{head}.{body[:-4]}AAAA.{signature}",
        f".{body}.{signature}",
        "x",
        "a.b.c",
        "é",
        f"{value}; {cookie}",
    ):
        page = await desk.get(Cookie=f"{name}={wrong}".encode().decode("latin-1"))
        assert page.status == 401, wrong


def test_a_session_ends_and_is_good_for_one_audience() -> None:
    key = generate_key("ES256", 0.0)

    class Ring:
        signer = TokenSigner([key], "http://broker.test")

        def jwks(self, now: float) -> Any:
            return jwks([key])

    now = time.time()
    ring: Any = Ring()
    sessions = Sessions(ring, "transfer-broker", lambda: now, secure=True)
    longest = Principal("\U0001f600" * 255, "\U0001f601" * 255, Role.MEMBER, now + 9999)
    field = sessions.open(longest)
    assert field.startswith("__Host-broker-status=")
    assert "; Secure" in field
    value = field.partition(";")[0]
    assert len(value) <= 4096  # what browsers keep at least (RFC 6265 section 6.1)
    known = sessions.principal(f"other=1; {value}")
    assert known is not None
    assert (known.subject, known.project, known.role) == (longest.subject, longest.project, Role.MEMBER)
    assert Sessions(ring, "another", lambda: now, secure=True).principal(value) is None
    ended = Sessions(ring, "transfer-broker", lambda: now - 4000, secure=True).open(longest).partition(";")[0]
    assert sessions.principal(ended) is None


async def test_refused_tokens_are_told_and_counted(desk: Desk) -> None:
    for token in ("nonsense", "a.b.c", "é", "", "x" * 9000, desk.broker.token("admin") + "x"):
        page = await desk.sign_in(token)
        assert page.status in (400, 401), token
        assert "Set-Cookie" not in page.headers
        assert 'role="alert"' in page.html
        assert not token or token not in page.html
    for _ in range(200):
        page = await desk.sign_in("a.b.c")
    assert page.status == 429
    assert int(page.headers["Retry-After"]) >= 1


async def forms_that_are_none(desk: Desk) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for body in (b"", b"token", b"token=a&token=b", b"\xff\xfe", b"&".join([b"a=b"] * 20)):
        page = await desk.send("POST", "/", data=body, headers=form)
        assert (page.status, "Set-Cookie" in page.headers) == (400, False), body
    assert (await desk.send("POST", "/", data=b"token=" + b"x" * (16 << 10), headers=form)).status == 413
    assert (await desk.send("POST", "/", data=b"{}", headers={"Content-Type": "application/json"})).status == 405
    assert (await desk.send("DELETE", "/", headers={})).status == 405


async def signing_out_takes_the_cookie_away(desk: Desk) -> None:
    page = await desk.post({"sign-out": "yes"})
    assert page.status == 303
    assert page.headers["Set-Cookie"].startswith("broker-status=; Max-Age=0;")


@pytest.mark.parametrize(
    ("headers", "own"),
    [
        ({"Host": "b:1"}, True),
        ({"Host": "b:1", "Origin": "http://b:1"}, True),
        ({"Host": "B:1", "Origin": "http://b:1"}, True),
        ({"Host": "inside", "Origin": "https://public.example"}, True),
        ({"Host": "b:1", "Origin": "http://b:2"}, False),
        ({"Host": "b:1", "Origin": "http://evil.example"}, False),
        ({"Host": "b:1", "Origin": "null"}, False),
        ({"Host": "", "Origin": "null"}, False),
        ({"Host": "b:1", "Sec-Fetch-Site": "same-origin", "Origin": "http://b:1"}, True),
        ({"Host": "b:1", "Sec-Fetch-Site": "same-site", "Origin": "http://b:1"}, False),
        ({"Host": "b:1", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Host": "b:1", "Sec-Fetch-Site": "none"}, False),
    ],
)
def test_which_forms_are_our_own(headers: dict[str, str], own: bool) -> None:
    assert is_own_form(CIMultiDictProxy(CIMultiDict(headers)), "public.example") is own


async def nobody_is_signed_in_or_out_from_elsewhere(desk: Desk) -> None:
    for form in ({"token": desk.broker.token("admin")}, {"sign-out": "yes"}):
        page = await desk.post(form, Origin="http://evil.example")
        assert (page.status, "Set-Cookie" in page.headers) == (403, False)


async def it_is_shown_anew_until_somebody_stops_that(desk: Desk) -> None:
    assert '<meta http-equiv="refresh" content="10">' in (await desk.see("reader")).html
    assert "http-equiv" not in (await desk.see("reader", path="/?refresh=off")).html


WITHOUT_STORES = (
    the_place_stays_free_for_others_than_browsers,
    every_answer_is_bare_of_scripts_frames_and_caches,
    signing_in_with_a_token_opens_the_page_for_an_hour,
    a_session_never_outlives_its_token,
    a_session_is_good_for_the_page_only,
    a_token_in_the_cookie_or_the_url_opens_nothing,
    a_session_altered_or_given_twice_is_none,
    forms_that_are_none,
    signing_out_takes_the_cookie_away,
    nobody_is_signed_in_or_out_from_elsewhere,
    it_is_shown_anew_until_somebody_stops_that,
)
"""What is the same whatever the catalogue holds."""


async def test_browsers_and_their_sessions(desk: Desk) -> None:
    for check in WITHOUT_STORES:  # one after the other, for one broker does for all
        await check(desk)


# -- who sees what


async def test_administrators_see_everything(desk: Desk) -> None:
    store = await desk.store("disk-1", slots=4)
    hidden = await desk.store("secret-1", site="vault", exposure="service", slots=2)
    await desk.report(await desk.ask(await desk.image(store)))
    await desk.ask(await desk.image(hidden, name="for-nodes"), "service", "nova", "compute")
    page = (await desk.see("admin")).text
    for word in ("disk-1", "secret-1", "vault", "private", "0 of 4", "1 of 2", "232.8 GiB of 931.3 GiB", "demo/alice", "nova/compute"):
        assert word in page, word
    assert "The last 1 reported transfer" in page
    assert "Worst paths" in page


async def test_members_see_their_own_and_nothing_of_private_stores(desk: Desk) -> None:
    store = await desk.store("disk-1", slots=4)
    hidden = await desk.store("secret-1", site="vault", exposure="service", slots=2)
    both = await desk.image(store, hidden)
    await desk.ask(both, "service", "nova", "compute")
    await desk.ask(both, subject="bob")
    mine = await desk.ask(both)
    await desk.report(mine)
    for averages in ("vault", "eu/az1"):
        await desk.db.execute(
            "INSERT INTO paths VALUES ($1, $2, 'read', 1e9, 1, 0, 0, 1, 1, now()) ON CONFLICT DO NOTHING", averages, hidden
        )
    page = await desk.see("member")
    for word in ("secret-1", "vault", "private", "nova", "compute", "bob", " of 4", "Read slots", "GiB of"):
        assert word not in page.text, word
    for word in ("disk-1", "eu/az1", mine["id"], "demo/alice", "1 store ", "Your last reports 1"):
        assert word in page.text, word
    assert "Stores 1 nothing" in page.text


async def test_a_private_store_changes_nothing_that_others_see(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "READING_SECONDS", 0.0)
    store = await desk.store("disk-1", slots=4)
    await desk.report(await desk.ask(await desk.image(store)))
    await desk.broker.context.memory.catch_up()
    before = await desk.see("member")
    hidden = await desk.store("secret-1", site="eu/az1", exposure="service", slots=1)
    await desk.store("secret-2", site="vault", exposure="service")
    await desk.ask(await desk.image(hidden), "service", "nova", "compute")
    for site in ("", "eu", "eu/az1"):
        await desk.db.execute("INSERT INTO paths VALUES ($1, $2, 'read', 1e6, 9, 0, 0, 1, 9, now())", site, hidden)
    await desk.broker.context.memory.catch_up()
    after = await desk.see("member")
    assert without_times(after) == without_times(before)


def without_times(page: Page) -> str:
    return re.sub(r"[\d-]+[ T][\d:]+(?: UTC|Z)|[\d:]+ UTC|[\d.]+ m?s ago", "", page.html)


async def test_services_see_private_stores_but_no_slots(desk: Desk) -> None:
    hidden = await desk.store("secret-1", site="vault", exposure="service", slots=2)
    await desk.ask(await desk.image(hidden), "service", "nova", "compute")
    await desk.store("disk-1")
    page = (await desk.see("service", "nova", "compute")).text
    assert "secret-1" in page
    assert "vault" in page
    assert "Read slots" not in page
    assert "nova/compute" in page
    assert "nova/compute" not in (await desk.see("service", "nova", "another")).text


async def test_a_store_made_private_leaves_no_gap_in_old_tickets(desk: Desk) -> None:
    stores = [await desk.store(f"disk-{n}") for n in range(3)]
    first = await desk.ask(await desk.image(*stores))
    gone = first["sources"][0]["store"]
    alone = await desk.ask(await desk.image(next(id for n, id in enumerate(stores) if gone == f"disk-{n}")))
    await desk.db.execute("UPDATE stores SET exposure = 'service' WHERE name = $1", gone)
    await desk.broker.context.memory.reload_stores()
    page = (await desk.see("member")).text
    assert gone not in page
    assert alone["id"] not in page
    assert first["id"] in page
    shares = [float(share) for share in re.findall(r"(?:active|standby) (\d+) %", page)]
    assert len(shares) == 2
    assert 98 <= sum(shares) <= 102
    assert re.findall(r"\d\. ", page.partition(first["id"])[2]) == ["1. ", "2. "]


async def test_names_are_text_whatever_is_in_them(desk: Desk) -> None:
    store = await desk.store("disk-1")
    image = await desk.image(store, name=HOSTILE, project=HOSTILE)
    await desk.ask(image, project=HOSTILE, subject=HOSTILE, X_Client_Instance=HOSTILE)
    page = await desk.see("admin", HOSTILE, HOSTILE)
    assert "<script" not in page.html
    assert "<img" not in page.html
    assert page.html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    signed = await desk.sign_in(desk.broker.token("member", HOSTILE, HOSTILE))
    assert "<script" not in (await desk.get(Cookie=cookie_of(signed))).html


async def test_what_is_wrong_with_stores_is_told(desk: Desk) -> None:
    await desk.store("good")
    full, off, blind = await desk.store("full", slots=1), await desk.store("off"), await desk.store("blind")
    failing = await desk.store("failing")
    await desk.db.execute("UPDATE stores SET enabled = false WHERE id = $1", off)
    await desk.db.execute("UPDATE stores SET abilities = '{}' WHERE id = $1", blind)
    await desk.db.execute("INSERT INTO paths VALUES ('', $1, 'read', 0, 0, 0, 0, 1, 10, now())", failing)
    await desk.ask(await desk.image(full))
    await desk.broker.context.memory.catch_up()
    await desk.broker.context.memory.reload_stores()
    page = (await desk.see("admin")).text
    for name, state in (("good", "open"), ("full", "full"), ("off", "disabled"), ("blind", "not usable"), ("failing", "failing")):
        assert f"{name} s3 {state}" in page, (name, page)
    assert "3 to look at" in page


async def test_why_a_store_was_left_out_is_told_to_those_who_may_know_it(desk: Desk) -> None:
    first, second = await desk.store("disk-1"), await desk.store("disk-2")
    hidden = await desk.store("secret-1", exposure="service")
    image = await desk.image(first, second, hidden)
    api = Api(desk.broker.url, desk.session, desk.broker.token("service", "nova", "compute"))
    asked = {"operation": "download", "image": image, "avoid": ["disk-1", "secret-1"]}
    assert (await api.post("/v1/tickets", asked)).status == 201
    for role in ("admin", "service"):
        assert re.search(
            r"Not offered: (disk-1|secret-1) \(avoided\) , (disk-1|secret-1) \(avoided\) \.", (await desk.see(role, "nova", "compute")).text
        )
    page = (await desk.see("member", "nova", "compute")).text
    assert "Not offered: disk-1 (avoided) ." in page
    assert "secret-1" not in page


async def test_who_waits_is_told_to_administrators_while_his_broker_lives(desk: Desk) -> None:
    store = await desk.store("disk-1", slots=1)
    living, dead = new_id(), new_id()
    await desk.db.execute("INSERT INTO desks VALUES ($1, now() + interval '1 hour'), ($2, now() - interval '5 seconds')", living, dead)
    for desk_id, project in ((living, HOSTILE), (dead, "orphan")):
        await desk.db.execute(
            """INSERT INTO waits (id, desk, project, priority, weight, direction, store_ids, bytes, asked_at)
               VALUES ($1, $2, $3, 4, 1, 'read', $4, 5000000, now() - interval '90 seconds')""",
            new_id(), desk_id, project, [store],
        )  # fmt: skip
    page = await desk.see("admin")
    assert "Waiting for a slot 1 1 min" in page.text
    assert "4.8 MiB disk-1 to read 4.00" in page.text
    assert "orphan" not in page.text
    assert "<script" not in page.html
    assert "Waiting for a slot" not in (await desk.see("member")).text


# -- bounds


async def test_five_hundred_stores_and_many_tickets(desk: Desk) -> None:
    await desk.db.execute(
        """WITH s AS (INSERT INTO stores (name, kind, site, endpoint, settings, credential, abilities)
               SELECT 'disk-' || n, 's3', 'eu/az' || (1 + n % 2), 'https://s.example', '{"bucket": "b"}', 's3', '{"reads": true}'
               FROM generate_series(1, 501) n RETURNING id),
           l AS (INSERT INTO slots (store_id, direction, slots) SELECT id, d, 8 FROM s, unnest(ARRAY['read', 'write']) d)
           INSERT INTO spaces (store_id) SELECT id FROM s"""
    )
    now = f"{int(time.time() * 1000):012x}70008000"
    await desk.db.execute(
        """INSERT INTO tickets (id, operation, project, subject, instance, address, blob_id, size, places, expires_at)
           SELECT ($1 || lpad(to_hex(n), 12, '0'))::uuid, 'download', 'demo', 'alice', '', '10.0.0.1', gen_random_uuid(), 1, '[]',
                  now() + interval '1 hour'
           FROM generate_series(1, 20000) n""",
        now,
    )
    await desk.broker.context.memory.reload_stores()
    page = await desk.see("admin")
    assert page.html.count('role="rowheader"') >= service.STORES
    assert "And 1 more;" in page.text
    assert len(page.html) < 2 << 20


# -- without the database


async def test_readings_are_shared_and_outlive_the_database(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.ask(await desk.image(await desk.store("disk-1")))
    reads = 0
    real = readings.read

    async def counted(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        return await real(*arguments)

    async def away(*_: Any) -> Any:
        raise errors.Unavailable("The catalogue cannot be reached.")

    monkeypatch.setattr(readings, "read", counted)
    monkeypatch.setattr(service, "READING_SECONDS", 1000.0)
    for _ in range(5):
        await desk.see("admin", subject="one")
        await desk.see("admin", subject="two")
    assert reads == 1
    monkeypatch.setattr(service, "READING_SECONDS", 0.0)
    monkeypatch.setattr(readings, "read", away)
    page = await desk.see("admin")
    for word in ("The database cannot be reached.", "was read at", "disk-1", "demo/alice", "<title>Database away"):
        assert word in (page.html if "<" in word else page.text)
    fresh = await desk.see("member", subject="somebody-new")
    assert "nothing is known of transfers and tickets" in fresh.text
    assert "disk-1" in fresh.text


async def test_a_database_that_hangs_is_waited_for_no_longer_than_patience(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.ask(await desk.image(await desk.store("disk-1")))
    monkeypatch.setattr(service, "READING_SECONDS", 0.0)
    monkeypatch.setattr(service, "PATIENCE_SECONDS", 60.0)
    assert "cannot be reached" not in (await desk.see("admin")).text
    monkeypatch.setattr(service, "PATIENCE_SECONDS", 0.3)
    async with desk.db.acquire() as connection:
        lock = connection.transaction()
        await lock.start()
        await connection.execute("LOCK TABLE leases IN ACCESS EXCLUSIVE MODE")
        page = (await desk.see("admin")).text
        assert "The database cannot be reached." in page
        assert "disk-1" in page
        await lock.rollback()
    monkeypatch.setattr(service, "PATIENCE_SECONDS", 60.0)
    assert "cannot be reached" not in (await desk.see("admin")).text


def test_ids_tell_when() -> None:
    assert UUID(str(new_id(1234567890.5))).int >> 80 == 1234567890500
