"""vote-bot: votes without end, for the doughnut 15 % of the time, else at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from urllib.parse import quote

from flask import Flask

from meshdemo.workloads.emojivoto.catalogue import CATALOGUE
from meshdemo.workloads.load import Target
from meshdemo.workloads.load_app import load_app
from meshdemo.workloads.server import run
from meshdemo.workloads.settings import Environment, Identity

FAVOURITE = ":doughnut:"
FAVOURITE_SHARE = 0.15


def build(env: Environment, identity: Identity) -> tuple[Flask, Callable[[], None]]:
    """The app; its settings are those of `load_app`.

    Raises:
        BadSetting: a value makes no sense.
    """

    def requests(target: Target) -> Callable[[], bytes]:
        votes = {
            choice: target.request("vote-bot", f"/api/vote?choice={quote(choice)}") for choice in CATALOGUE
        }
        others = [vote for choice, vote in votes.items() if choice != FAVOURITE]

        def next_request() -> bytes:
            if random.random() < FAVOURITE_SHARE:  # noqa: S311 - no secret hangs on it
                return votes[FAVOURITE]
            return random.choice(others)  # noqa: S311

        return next_request

    return load_app(env, identity, target="http://web:5000", rps=20.0, metrics="vote_bot", requests=requests)


if __name__ == "__main__":
    run("vote-bot", build)
