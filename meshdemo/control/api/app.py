"""The WSGI application: who is let in, how errors are told, and the parts of the API put together.

Bound to loopback, and yet guarded: a bearer token, and a Host header that is a loopback name, so that no page
in a browser reaches it by a name of its own that resolves to 127.0.0.1 (DNS rebinding).

A further front end (the dashboard) is a blueprint: give it to `create_app`, with an `authorize` of its own
if it signs in otherwise. It finds the mesh through `request.control()`.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
from collections.abc import Callable, Collection, Sequence

from flask import Blueprint, Flask, Request, Response, jsonify, request
from werkzeug.exceptions import HTTPException

from meshdemo.control.api import changes, faults, signals, state
from meshdemo.control.api.mesh import Control
from meshdemo.errors import BadInput, MeshdemoError

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 10

Authorize = Callable[[Request], bool]


def create_app(
    mesh: Control,
    *,
    token: str,
    allowed_hosts: Collection[str] = (),
    blueprints: Sequence[Blueprint] = (),
    authorize: Sequence[Authorize] = (),
    open_port: int | None = None,
) -> Flask:
    """The WSGI application.

    Args:
        token: what `Authorization: Bearer` must carry.
        allowed_hosts: names besides those of loopback that a Host header may say.
        blueprints: further front ends. Their views are guarded as the API's are, unless one is marked with
            `open_to_all`.
        authorize: other ways to sign in, each told of the request.
        open_port: on this port, of another address, only `/healthz` and `/metrics` answer, under any name.
    """
    app = Flask("meshdemo.control", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.extensions["meshdemo"] = mesh
    expected = f"Bearer {token}".encode()
    hosts = frozenset(host.lower() for host in allowed_hosts)

    def signed_in() -> bool:
        given = request.headers.get("Authorization", "").encode()
        return hmac.compare_digest(given, expected) or any(check(request) for check in authorize)

    @app.before_request
    def guard() -> Response | None:
        view = app.view_functions.get(request.endpoint or "")
        is_open = getattr(view, "open_to_all", False)
        if open_port is not None and request.environ.get("SERVER_PORT") == str(open_port):
            # Reached from elsewhere, by whatever name; what stands here is no secret.
            return None if is_open and request.path in ("/healthz", "/metrics") else _refusal(404, "not here")
        if not _host_allowed(request.host, hosts):
            return _refusal(
                403,
                f"this server is not called '{request.host}'",
                "call it by a loopback address or localhost",
            )
        if is_open or signed_in():
            return None
        refusal = _refusal(401, "no valid token", "`meshdemo dashboard` prints a link that signs in")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal

    @app.after_request
    def headers(response: Response) -> Response:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    app.register_error_handler(MeshdemoError, _user_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _bug)
    for blueprint in (state.views, faults.views, changes.views, signals.views, *blueprints):
        app.register_blueprint(blueprint)
    return app


def _host_allowed(host: str, allowed: Collection[str]) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]").lower()
    if name == "localhost" or name in allowed:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal(status: int, error: str, remedy: str = "") -> Response:
    response = jsonify({"error": error, "remedy": remedy})
    response.status_code = status
    return response


def _user_error(error: MeshdemoError) -> Response:
    return _refusal(400 if isinstance(error, BadInput) else 409, error.message, error.remedy)


def _http_error(error: HTTPException) -> Response:
    return _refusal(error.code or 500, f"{request.method} {request.path}: {error.description or error.name}")


def _bug(error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return _refusal(
        500, f"the control plane failed at {request.method} {request.path}", "see `meshdemo logs`"
    )
