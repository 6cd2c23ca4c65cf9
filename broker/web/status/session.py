"""A browser's session: who signed in, in a cookie that is good for looking at the status page and for nothing else.

Rules
- The cookie is a JWT of the broker's own keys, so that every broker of the catalogue knows it and none has to remember it. Its audience
  is never that of bearer tokens, so the API takes it for none; the page in turn takes no bearer token from a cookie.
- It ends after an hour, and never later than the token that was signed in with. That token itself is not kept.
- ``HttpOnly``, ``SameSite=Strict``, and over TLS ``Secure`` with the prefix ``__Host-`` (RFC 6265bis, section 4.1.3), so that neither
  scripts nor other sites nor other hosts of the domain can use or set it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jwt

from broker import errors
from broker.model import Principal, Role
from broker.service.keys import Keyring
from broker.sign.token import NoSigningKey

SESSION_SECONDS = 3600.0


class Sessions:
    """Makes the cookies and reads them. `audience` is that of bearer tokens; `secure` whether browsers come over TLS."""

    def __init__(self, keys: Keyring, audience: str, clock: Callable[[], float], *, secure: bool) -> None:
        self._keys = keys
        self._audience = f"{audience} status page"
        self._clock = clock
        self._secure = secure
        self.cookie = "__Host-broker-status" if secure else "broker-status"

    def open(self, principal: Principal) -> str:
        """The Set-Cookie field for who has signed in. Raises `Unavailable` while no key may sign."""
        now = self._clock()
        end = int(min(principal.expires_at, now + SESSION_SECONDS))
        claims = {
            "aud": self._audience, "sub": principal.subject, "project": principal.project, "role": principal.role.value,
            "exp": end,
        }  # fmt: skip
        try:
            signed = self._keys.signer.sign_claims(claims, now)
        except NoSigningKey:
            raise errors.Unavailable("No key may sign now.", retry_after=5.0) from None
        return self._field(signed, max(0, end - int(now)))

    def close(self) -> str:
        """The Set-Cookie field that makes a browser forget its session."""
        return self._field("", 0)

    def principal(self, cookies: str) -> Principal | None:
        """Who signed in, by the Cookie field; ``None`` without a session, or when it has ended."""
        value = _value(cookies, self.cookie)
        if not value:
            return None
        try:
            kid = jwt.get_unverified_header(value).get("kid")
            key = next((key for key in self._keys.jwks(self._clock())["keys"] if key["kid"] == kid), None)
            if key is None:
                return None
            return self._from_claims(
                jwt.decode(
                    value,
                    jwt.PyJWK(key, key["alg"]).key,
                    algorithms=[key["alg"]],
                    audience=self._audience,
                    issuer=self._keys.signer.issuer,
                    options={"require": ["exp", "iss", "aud"], "strict_aud": True},
                )
            )
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def _from_claims(self, claims: dict[str, Any]) -> Principal:
        return Principal(str(claims["sub"]), str(claims["project"]), Role(claims["role"]), float(claims["exp"]))

    def _field(self, value: str, seconds: int) -> str:
        return f"{self.cookie}={value}; Max-Age={seconds}; Path=/; HttpOnly; SameSite=Strict" + ("; Secure" if self._secure else "")


def _value(cookies: str, name: str) -> str:
    """The cookie of that name; none of two is believed."""
    found = [each.partition("=")[2] for each in cookies.split(";") if each.partition("=")[0].strip() == name]
    return found[0].strip() if len(found) == 1 else ""
