"""How the page in the browser signs in to the control plane's API.

It gets the API's token once, in the fragment of the link that `meshdemo dashboard` prints (browsers send a
fragment to nobody), and trades it for the two halves of a session: a cookie that scripts cannot read, and a
key that the page keeps and sends in a header. Each is worth nothing without the other:

- The cookie goes to every port of its host, for cookies know no ports, and so to the workloads of a local
  mesh too. Without the key they can do nothing with it.
- The key travels in a header that a page of another origin may only send if it is allowed to (CORS), and
  nobody is. A key that leaks is of no use without the cookie.

Both follow from the token and a time of expiry: nothing has to be remembered, and a session outlives a
restart of the control plane. (The Host header, against DNS rebinding, is checked by the API for all
requests.)
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Final

from flask import Request, Response, jsonify

LIFETIME_S: Final = 12 * 3600
KEY_HEADER: Final = "X-Meshdemo"

# The page is made of files of this server and nothing else: nothing from outside, no place in anybody's
# frame, no inline style, and one inline script, which loads the page again when a file of it did not come;
# by its hash, which browsers print when it has changed.
SECURITY_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'sha256-/iMBgG/AlxjczfTz/zPtHVdN/SF9KXEh9AZTKygZz6E='; "
        "style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Sessions:
    """The sessions of one mesh.

    Args:
        token: the API's bearer token.
        mesh: the mesh's name; several meshes on one host must not overwrite each other's cookies.
    """

    def __init__(self, token: str, mesh: str, *, clock: Callable[[], float] = time.time) -> None:
        if not token:
            raise ValueError("an empty token would let everybody in")
        self._token = token
        self._cookie = f"meshdemo-{mesh}"
        self._clock = clock

    def open(self, request: Request) -> Response | None:
        """The answer that carries a new session; None unless the request has the token itself.

        A session does not count: it could make itself last for ever.
        """
        if not _equal(request.headers.get("Authorization", ""), f"Bearer {self._token}"):
            return None
        expires = int(self._clock()) + LIFETIME_S
        answer = jsonify({"key": self._half("key", expires), "expires_at": expires})
        answer.set_cookie(
            self._cookie,
            f"{expires}.{self._half('cookie', expires)}",
            max_age=LIFETIME_S,
            httponly=True,
            samesite="Strict",
            path="/",
        )
        return answer

    def authorize(self, request: Request) -> bool:
        """Does the request carry both halves of a session, and come from the page itself?"""
        return _same_origin(request) and any(
            self._is_valid(value, request.headers.get(KEY_HEADER, ""))
            for value in _cookies(request.headers.get("Cookie", ""), self._cookie)
        )

    def _is_valid(self, cookie: str, key: str) -> bool:
        expires_text, _, half = cookie.partition(".")
        if not (expires_text.isascii() and expires_text.isdigit() and len(expires_text) < 16):
            return False
        expires = int(expires_text)
        return (
            self._clock() < expires
            and _equal(half, self._half("cookie", expires))
            and _equal(key, self._half("key", expires))
        )

    def _half(self, which: str, expires: int) -> str:
        return hmac.new(self._token.encode(), f"{which} {expires}".encode(), hashlib.sha256).hexdigest()


def _same_origin(request: Request) -> bool:
    """Did a page of this very origin make the request? Browsers say, and let no page lie about it."""
    site = request.headers.get("Sec-Fetch-Site")
    origin = request.headers.get("Origin")
    return site in (None, "same-origin") and origin in (None, f"{request.scheme}://{request.host}")


def _cookies(header: str, name: str) -> list[str]:
    """All values of a cookie: another port of the host may have set one of the same name."""
    values = []
    for part in header.split(";"):
        jar = SimpleCookie()
        try:
            jar.load(part.strip())
        except CookieError:
            continue
        if name in jar:
            values.append(jar[name].value)
    return values


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())
