"""What the control plane has its runtime do for the page: faults in apps and of processes.

The control plane itself changes sidecars and nothing else. What runs is changed by the runtime, and the way
to it is the command that a person types: a local mesh gives its control plane that command (`server --hand`),
and the page's button runs what is written beside it. No shell has a part in it, and each value is one word
with its option, so that none can be taken for another option.

Where there is no such command (Kubernetes: the control plane would need the right to change Deployments), the
page shows what to type instead.
"""

from __future__ import annotations

import json
import logging
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from flask import Blueprint, Response, jsonify, request

from meshdemo.errors import BadInput, Failed

log = logging.getLogger(__name__)

_MOST_S = 120.0
_BAD_INPUT = 2  # exit status of a command that was asked for something wrong
_OPTIONS = {
    "service": "--service", "version": "--version", "instance": "--instance", "lat_ms": "--lat",
    "err_rate": "--err",
}  # fmt: skip
_KINDS = {"degrade": (), "crash": ("--crash",), "hang": ("--hang",)}


class Hand:
    """Runs the command, one at a time.

    Args:
        command: the words of `meshdemo` for this mesh; none: nothing can be done by it.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = tuple(command)
        self._busy = threading.Lock()

    @property
    def there(self) -> bool:
        """Whether anything can be done by it."""
        return bool(self._command)

    def fault(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Break an app or a process; the fault as `meshdemo fault -o json` says it.

        Raises:
            BadInput: what is asked makes no sense. Failed: it did not succeed, or there is no command.
        """
        return self._run("fault", *fault_words(asked))

    def clear(self) -> dict[str, Any]:
        """End all faults. Raises as `fault` does."""
        return self._run("fault", "clear")

    def _run(self, *words: str) -> dict[str, Any]:
        typed = f"meshdemo {' '.join(words)}"
        if not self._command:
            raise Failed("this control plane cannot change what runs", f"type: {typed}")
        if not self._busy.acquire(blocking=False):
            raise Failed("another change of what runs is under way", "try again when it is done")
        try:
            done = subprocess.run(
                [*self._command, *words, "-o", "json"], capture_output=True, text=True, check=False,
                timeout=_MOST_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed(f"`{typed}` did not succeed: {error}") from error
        finally:
            self._busy.release()
        if done.returncode:
            message, _, remedy = done.stderr.strip().removeprefix("meshdemo: ").partition("\n")
            raise (BadInput if done.returncode == _BAD_INPUT else Failed)(message, " ".join(remedy.split()))
        log.info("done for the page: %s", typed)
        outcome: dict[str, Any] = json.loads(done.stdout)
        return outcome


def fault_words(asked: Mapping[str, Any]) -> list[str]:
    """The options of `meshdemo fault` that ask for this.

    Raises:
        BadInput: a field that there is not, or a value that is neither a number nor a name.
    """
    kind = asked.get("kind", "degrade")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise BadInput(f"kind {kind!r}", f"allowed: {', '.join(_KINDS)}")
    if unknown := sorted(set(asked) - {"kind", "for_s", *_OPTIONS}):
        raise BadInput(f"no field {', '.join(unknown)}", f"fields: kind, for_s, {', '.join(_OPTIONS)}")
    words = list(_KINDS[kind])
    for name in (*_OPTIONS, "for_s"):
        value = asked.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise BadInput(f"{name} {value!r}", "a name or a number")
        words.append(f"--for={value}s" if name == "for_s" else f"{_OPTIONS[name]}={value}")
    return words


def blueprint(hand: Hand) -> Blueprint:
    """`/v1/hand/faults`, for `api.create_app`."""
    views = Blueprint("hand", __name__)

    @views.post("/v1/hand/faults")
    def break_it() -> Response:
        body = request.get_json(silent=True)
        if not isinstance(body, dict):
            raise BadInput("the body is no JSON object", 'such as {"service": "service-b", "err_rate": 0.2}')
        return jsonify(hand.fault(body))

    @views.delete("/v1/hand/faults")
    def mend_it() -> Response:
        return jsonify(hand.clear())

    return views
