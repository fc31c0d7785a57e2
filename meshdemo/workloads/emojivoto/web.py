"""web: the page with the emoji to vote for and the leaderboard, and the API behind it.

EMOJI and VOTING name the services it asks over gRPC (`emoji:5000`, `voting:5000`). LAT_MS and ERR_RATE make
its API slow and faulty (`breakable`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import grpc
import grpc.experimental.gevent
from flask import Flask, Response, abort, jsonify, request

from meshdemo.workloads.breakable import Breakage
from meshdemo.workloads.emojivoto import rpc
from meshdemo.workloads.emojivoto.rpc import pb
from meshdemo.workloads.server import flask_app, run
from meshdemo.workloads.settings import Environment, Identity

_TIMEOUT_S = 10.0
# What a failed call to emoji or voting means for the browser.
_STATUS = {
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def build(env: Environment, identity: Identity) -> tuple[Flask, Callable[[], None]]:
    """The app, from EMOJI and VOTING (host:port)."""
    # gRPC waits in its own threads; this makes a waiting call yield to gevent's other requests.
    grpc.experimental.gevent.init_gevent()
    emoji, voting = (rpc.channel(env.text(name, f"{name.lower()}:5000")) for name in ("EMOJI", "VOTING"))
    list_emoji = rpc.method(emoji, "EmojiService", "List")
    find_emoji = rpc.method(emoji, "EmojiService", "Find")
    vote_for = rpc.method(voting, "VotingService", "Vote")
    standings = rpc.method(voting, "VotingService", "Leaderboard")
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    app = flask_app(identity)
    breakage = Breakage.of(env)

    @app.before_request
    def broken() -> tuple[dict[str, str], int] | None:
        if request.path.startswith("/api/") and breakage.strike(gevent.sleep):
            return {"error": "injected"}, 500
        return None

    @app.errorhandler(grpc.RpcError)
    def failed(error: grpc.RpcError) -> tuple[dict[str, str], int]:
        return {"error": error.details() or error.code().name.lower()}, _STATUS.get(error.code(), 500)

    @app.get("/")
    def index() -> Response:
        return Response(page, mimetype="text/html")

    @app.get("/api/list")
    def list_all() -> Response:
        reply = list_emoji(pb.ListRequest(), timeout=_TIMEOUT_S)
        return jsonify([{"shortcode": one.shortcode, "unicode": one.unicode} for one in reply.emoji])

    @app.get("/api/vote")
    def vote() -> dict[str, Any]:
        choice = request.args.get("choice", "")
        if not choice:
            abort(400, "say what you vote for: /api/vote?choice=:joy:")
        found = find_emoji(pb.FindRequest(shortcode=choice), timeout=_TIMEOUT_S)
        reply = vote_for(pb.VoteRequest(shortcode=found.shortcode), timeout=_TIMEOUT_S)
        return {"choice": found.shortcode, "votes": reply.votes}

    @app.get("/api/leaderboard")
    def leaderboard() -> Response:
        reply = standings(pb.LeaderboardRequest(), timeout=_TIMEOUT_S)
        pictures = {
            one.shortcode: one.unicode for one in list_emoji(pb.ListRequest(), timeout=_TIMEOUT_S).emoji
        }
        return jsonify(
            [
                {"shortcode": one.shortcode, "unicode": pictures.get(one.shortcode, ""), "votes": one.votes}
                for one in reply.standings
            ]
        )

    return app, lambda: None


if __name__ == "__main__":
    run("web", build)
