"""Tokens forged by somebody who knows everything but a private key, and honest ones made for something else."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from broker.sign.token import TokenSigner, generate_key, jwks, public_jwk
from tests.attacks import forge
from tests.attacks.attack import Tries, attack
from tests.attacks.target import Target, TokenTarget, fresh_key
from tests.attacks.wire import Shot

_BODY = b"planted by the attacker. " * 8


def token(target: Target) -> bool:
    return isinstance(target, TokenTarget) and target.scheme == "token"


def writing(target: Target) -> bool:
    return token(target) and target.writes


def bearing(target: Target) -> bool:
    """Stores with tokens, and the broker with its bearer tokens."""
    return isinstance(target, TokenTarget)


@attack("alg none", holds="the claims of a token", on=bearing)
async def alg_none(target: TokenTarget, tries: Tries) -> None:
    """Tokens that say that they need no signature, for the victim's object: in every case of letters, with and without one."""
    header, payload, sign = forge.parts(target.honest(target.victim.key))
    for algorithm in ("none", "None", "NONE", "nOnE", "", None, "null", "ES256 ", "es256"):
        forged = forge.signed({**header, "alg": algorithm}, payload, None)
        await tries.fire(f"{algorithm!r}", target.carrying(forged, target.victim.key))
        await tries.fire(f"{algorithm!r}, signature kept", target.carrying(forged + sign, target.victim.key))
    for what, changed in (
        ("two segments", forged.rpartition(".")[0].rpartition(".")[0]),
        ("one segment", forged.split(".")[0]),
        ("dots", ".."),
        ("a dot", "."),
        ("unsigned, no dot", ".".join(forge.signed(header, payload, None).split(".")[:2])),
        ("no alg", forge.signed({name: value for name, value in header.items() if name != "alg"}, payload, None)),
    ):
        await tries.fire(what, target.carrying(changed, target.victim.key))


@attack("HMAC with the public key", holds="the published key set", on=bearing)
async def confused(target: TokenTarget, tries: Tries) -> None:
    """The public key taken for an HMAC secret, in every form that a confused verifier may keep it in."""
    header, payload, _ = forge.parts(target.honest(target.victim.key))
    key = target.keys[0]
    for algorithm in ("HS256", "HS384", "HS512"):
        for form, secret in forge.secrets_from(key, public_jwk(key)).items():
            forged = forge.signed({**header, "alg": algorithm}, payload, secret)
            await tries.fire(f"{algorithm} with {form}", target.carrying(forged, target.victim.key))
    await tries.fire("HMAC under ES256", target.carrying(forge.signed(header, payload, public_jwk(key)["x"].encode()), target.victim.key))


@attack("another algorithm", holds="the published key set", on=bearing)
async def other_algorithm(target: TokenTarget, tries: Tries) -> None:
    """Signatures of the attacker's keys of other kinds under the published kid, and ECDSA signatures that prove nothing."""
    header, payload, _ = forge.parts(target.honest(target.victim.key))
    for algorithm in ("ES256", "RS256", "EdDSA"):
        own = generate_key(algorithm, 0)  # type: ignore[arg-type]
        for claimed in ("ES256", "RS256", "EdDSA", "PS256", "ES384", "ES256K", "RS1"):
            forged = forge.signed({**header, "alg": claimed}, payload, own.private)
            await tries.fire(f"{algorithm} said to be {claimed}", target.carrying(forged, target.victim.key))
    body = f"{forge.written(header)}.{forge.written(payload)}"
    order = forge._P256_ORDER.to_bytes(32, "big")
    one = (1).to_bytes(32, "big")
    for name, raw in (
        ("r = s = 0", bytes(64)),
        ("r = s = n", order * 2),
        ("r = 1, s = n", one + order),
        ("r = n, s = 1", order + one),
        ("r = s = 1", one * 2),
    ):
        await tries.fire(name, target.carrying(f"{body}.{forge.segment(raw)}", target.victim.key))


@attack("kid injected", holds="a key of his own, and a server", on=bearing)
async def injected_kid(target: TokenTarget, tries: Tries) -> None:
    """A kid that is a path, a URL, SQL, a template, another type, or another key's; counts also when the attacker's server is asked."""
    header, payload, _ = forge.parts(target.honest(target.victim.key))
    own = generate_key("ES256", 0)
    async with _lair(own) as lair:
        kids: dict[str, Any] = {
            "/dev/null": "/dev/null",
            "../../../../dev/null": "../../../../dev/null",
            "/proc/sys/kernel/randomize_va_space": "/proc/sys/kernel/randomize_va_space",
            "a URL": f"{lair.url}/jwks",
            "a file URL": "file:///dev/null",
            "SQL": "x' UNION SELECT 'k'--",
            "a template": "{{7*7}}${7*7}",
            "a command": "|sleep 0",
            "empty": "",
            "a list": [own.id],
            "an object": {"kid": own.id},
            "a number": 0,
            "null": None,
            "true": True,
            "the attacker's": own.id,
            "NUL behind": f"{target.keys[0].id}\x00",
            "a space behind": f"{target.keys[0].id} ",
            "lower case": target.keys[0].id.lower(),
            "10,000 letters": "k" * 3000,
            "__proto__": "__proto__",
            "constructor": "constructor",
            "toString": "toString",
            "left out": ...,
        }
        for name, kid in kids.items():
            head = forge._merged(header, {"kid": kid})
            await tries.fire(f"{name}, own key", target.carrying(forge.signed(head, payload, own.private), target.victim.key))
            await tries.fire(
                f"{name}, empty HMAC", target.carrying(forge.signed({**head, "alg": "HS256"}, payload, b""), target.victim.key)
            )
        tries.tried("a fetch from the attacker's server", bool(lair.asked), str(lair.asked))


@attack("jku, jwk, x5u, x5c", holds="a key of his own, and a server", on=bearing)
async def injected_key(target: TokenTarget, tries: Tries) -> None:
    """The key comes with the token: as itself, as a URL of a key set or certificate; under the published kid and under another."""
    header, payload, _ = forge.parts(target.honest(target.victim.key))
    own = generate_key("ES256", 0)
    async with _lair(own) as lair:
        given: dict[str, dict[str, Any]] = {
            "jku": {"jku": f"{lair.url}/jwks"},
            "jku, userinfo": {"jku": f"http://{target.issuer.partition('//')[2]}@{lair.url.partition('//')[2]}/jwks"},
            "jwk": {"jwk": public_jwk(own)},
            "x5u": {"x5u": f"{lair.url}/x509"},
            "x5c": {"x5c": ["MIIB"]},
            "iss": {"iss": lair.url},
            "crit": {"crit": ["exp"]},
            "crit, own": {"crit": ["x"], "x": 1},
            "b64": {"b64": False, "crit": ["b64"]},
            "cty": {"cty": "JWT"},
            "enc": {"enc": "A128GCM", "zip": "DEF"},
        }
        for name, more in given.items():
            for kid, whose in ((own.id, "own kid"), (target.keys[0].id, "published kid")):
                forged = forge.signed({**header, **more, "kid": kid}, payload, own.private)
                await tries.fire(f"{name}, {whose}", target.carrying(forged, target.victim.key))
        issued = forge.signed({**header, "kid": own.id}, {**payload, "iss": lair.url}, own.private)
        await tries.fire("the attacker as issuer", target.carrying(issued, target.victim.key))
        tries.tried("a fetch from the attacker's server", bool(lair.asked), str(lair.asked))


@dataclass
class _Lair:
    url: str
    asked: list[str]


@contextlib.asynccontextmanager
async def _lair(key: Any) -> AsyncIterator[_Lair]:
    """The attacker's server; it offers his key and notes who asks."""
    lair = _Lair("", [])

    async def answer(request: web.Request) -> web.Response:
        lair.asked.append(request.path)
        return web.json_response(jwks([key]))

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    lair.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield lair
    finally:
        await runner.cleanup()


@attack("claims rewritten", holds="a token to read one object", on=bearing)
async def rewritten_claims(target: TokenTarget, tries: Tries) -> None:
    """Each claim of an honest token is changed, left out, doubled or made another type, under the old signature."""
    honest = target.honest(target.mine.key)
    tries.control((await target.fire(target.carrying(honest, target.mine.key))).ok, "the honest token")
    header, payload, sign = forge.parts(honest)
    changes: dict[str, dict[str, Any]] = {
        "path": {"path": f"{target.base}/{target.victim.key}"},
        "path /": {"path": "/"},
        "path *": {"path": "*"},
        "no path": {"path": ...},
        "mth": {"mth": "DELETE"},
        "mth *": {"mth": "*"},
        "mths": {"mth": ["GET", "PUT"]},
        "aud list": {"aud": ["x", "*"]},
        "role": {"role": "admin"},
        "project": {"project": "other"},
        "exp": {"exp": int(time.time()) + 10**6},
        "nothing": dict.fromkeys(payload, ...),
    }
    for name, change in changes.items():
        key = target.victim.key if name.startswith(("path", "no path", "nothing")) else target.mine.key
        method = "DELETE" if name.startswith("mth") else "GET"
        await tries.fire(name, target.carrying(forge.rewritten(honest, change), key, method))
    doubled = json.dumps(payload)[:-1] + f', "path": "{target.base}/{target.victim.key}"}}'
    await tries.fire("path twice", target.carrying(f"{forge.written(header)}.{forge.written(doubled.encode())}.{sign}", target.victim.key))
    for name, raw in (
        ("a list", b"[]"),
        ("null", b"null"),
        ("not JSON", b"{"),
        ("deep", b"[" * 2000),
        ("not UTF-8", b'{"a":"\xff"}'),
        ("BOM", b"\xef\xbb\xbf{}"),
    ):
        await tries.fire(f"payload is {name}", target.carrying(f"{forge.written(header)}.{forge.written(raw)}.{sign}", target.mine.key))
        await tries.fire(f"header is {name}", target.carrying(f"{forge.written(raw)}.{forge.written(payload)}.{sign}", target.mine.key))


@attack("token spelled otherwise", holds="a token to read one object", on=bearing)
async def respelled(target: TokenTarget, tries: Tries) -> None:
    """The same signature with padding, unused bits, as DER, with bytes more; and s replaced by n - s."""
    honest = target.honest(target.mine.key)
    tries.control((await target.fire(target.carrying(honest, target.mine.key))).ok, "the honest token")
    for name, other in forge.other_spellings(honest).items():
        await tries.fire(name, target.carrying(other, target.mine.key))
    await tries.fire("s replaced by n - s", target.carrying(forge.high_s(honest), target.mine.key))


@attack("issuer altered", holds="a published key that signs for another issuer", on=bearing)
async def other_issuer(target: TokenTarget, tries: Tries) -> None:
    """Rightly signed tokens that name another issuer, also by case, a slash, a prefix and a list."""
    for name, issuer in _near(target.issuer):
        await tries.fire(name, target.carrying(target.honest(target.mine.key, iss=issuer), target.mine.key))


@attack("audience altered", holds="an honest token for another store", on=bearing)
async def other_audience(target: TokenTarget, tries: Tries) -> None:
    """Rightly signed tokens for another store, also by case, a prefix, a suffix, a list with the right one in it."""
    for name, audience in _near(target.audience):
        await tries.fire(name, target.carrying(target.honest(target.mine.key, aud=audience), target.mine.key))
    right = target.honest(target.mine.key, aud=[target.audience, "other"])
    await tries.fire("a list with the right one", target.carrying(right, target.mine.key))


def _near(text: str) -> list[tuple[str, Any]]:
    swapped = text.swapcase()
    return [
        ("another", "other"),
        ("other case", swapped),
        ("a slash behind", f"{text}/"),
        ("a prefix", text[:-1]),
        ("a suffix", f"{text}x"),
        ("a space", f" {text}"),
        ("empty", ""),
        ("null", None),
        ("left out", ...),
        ("*", "*"),
    ]


@attack("claims of the wrong shape", holds="a published key, honestly used", on=token)
async def misshapen(target: TokenTarget, tries: Tries) -> None:
    """Rightly signed tokens with claims that the contract does not allow: unknown ones, wrong types, missing ones."""
    now = time.time()
    for name, change in (
        ("an unknown claim", {"max": 1}),
        ("len on a GET", {"len": 5}),
        ("dig on a GET", {"dig": "sha256:" + "0" * 64}),
        ("no jti", {"jti": ...}),
        ("no nbf", {"nbf": ...}),
        ("no exp", {"exp": ...}),
        ("no sub", {"sub": ...}),
        ("exp as text", {"exp": str(int(now) + 600)}),
        ("exp true", {"exp": True}),
        ("exp far away", {"exp": 1 << 60}),
        ("path without a slash", {"path": target.mine.key}),
        ("a method of small letters", {"mth": "get"}),
        ("off without upl", {"off": 0}),
    ):
        await tries.fire(name, target.carrying(target.honest(target.mine.key, **change), target.mine.key))


@attack("token in two places", holds="a token to read one object", on=token)
async def two_places(target: TokenTarget, tries: Tries) -> None:
    """The token in query and header, twice in either, in a cookie, in a body, under other names of the parameter."""
    own, forged = (
        target.honest(target.mine.key),
        forge.rewritten(target.honest(target.mine.key), {"path": f"{target.base}/{target.victim.key}"}),
    )
    get = target.carrying(own, target.mine.key)
    tries.control((await target.fire(get.asking("").saying(("Authorization", f"Bearer {own}")))).ok, "the token in Authorization")
    victim = target.get(target.victim.key).path
    bearer = ("Authorization", f"Bearer {own}")
    await tries.fire("query and header", get.saying(bearer))
    await tries.fire("query, forged header", get.saying(("Authorization", f"Bearer {forged}")))
    await tries.fire("header, forged query", get.asking(f"token={forged}").saying(bearer))
    await tries.fire("header twice", get.asking("").saying(bearer, bearer))
    await tries.fire("header twice, forged first", get.asking("").saying(("Authorization", f"Bearer {forged}"), bearer))
    await tries.fire("header twice, forged last", get.asking("").saying(bearer, ("Authorization", f"Bearer {forged}")))
    await tries.fire("two in one header", get.asking("").saying(("Authorization", f"Bearer {forged}, Bearer {own}")))
    for query in (
        f"Token={own}",
        f"TOKEN={own}",
        f"access_token={own}",
        f"token[]={own}",
        f"%74oken={own}&token={own}",
        f"x=1;token={own}",
        f"a&token={own}",
    ):
        await tries.fire(
            f"?{query.partition('=')[0]}=… ({len(query)})" if "&" in query or ";" in query else f"?{query.partition('=')[0]}",
            get.asking(query),
        )
    await tries.fire("a cookie", get.asking("").saying(("Cookie", f"token={own}")))
    await tries.fire("a cookie, the victim's path", get.asking("").at(victim).saying(("Cookie", f"token={own}"), bearer))
    await tries.fire("X-Original-URL", get.at(victim).saying(("X-Original-URL", get.target), ("X-Rewrite-URL", get.target)))
    await tries.fire(
        "X-Original-URL, the victim's",
        get.saying(("X-Original-URL", victim), ("X-Rewrite-URL", victim)),
        lambda reply: reply.shows(target.victim.marker),
    )


@attack("key revoked", holds="an honest token of a key that was revoked since", on=token)
async def revoked(target: TokenTarget, tries: Tries) -> None:
    """A token that worked is used after its key was revoked: to read, to write, with its kid replaced by the living one's."""
    dying = target.keys[1]
    wanted = target.claims("GET", target.mine.key)
    old = TokenSigner([dying], target.issuer).sign(wanted, time.time())
    tries.control((await target.fire(target.carrying(old, target.mine.key))).ok, "a token of the key before it is revoked")
    await target.revoke()
    await tries.fire("to read", target.carrying(old, target.mine.key))
    await tries.fire("under the living key's kid", target.carrying(forge.rewritten(old, {}, {"kid": target.keys[0].id}), target.mine.key))
    await tries.fire("without a kid", target.carrying(forge.rewritten(old, {}, {"kid": ...}), target.mine.key))
    if target.writes:
        key = fresh_key("revoked")
        late = TokenSigner([dying], target.issuer).sign(target.claims("PUT", key, length=len(_BODY)), time.time())
        await tries.writes("to write", target.carrying(late, key, "PUT", _BODY), key)
    await target.restore()


@attack("single use", holds="a used token for one upload", on=writing)
async def used_twice(target: TokenTarget, tries: Tries) -> None:
    """An upload's token is used again after the object was deleted (by its owner, who thinks that it is gone), also in another spelling."""
    key = fresh_key("once")
    token = target.token("PUT", key, length=len(_BODY))
    put = target.carrying(token, key, "PUT", _BODY)
    tries.control((await target.fire(put)).ok, "the first use")
    await target.store.delete(key)
    await tries.writes("again", put, key)
    await target.store.delete(key)
    await tries.writes("again, s replaced by n - s", target.carrying(forge.high_s(token), key, "PUT", _BODY), key)
    await target.store.delete(key)
    await tries.writes("again, in Authorization", Shot("PUT", put.path, (("Authorization", f"Bearer {token}"),), _BODY), key)
    await target.store.delete(key)
