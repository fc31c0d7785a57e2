"""Webhooks: events as JSON by POST. Each has a queue and a thread of its own, so none can hold up healing."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from meshdemo.remediation.events import Event
from meshdemo.remediation.policy import Webhook

_QUEUE = 200
_TRIES = 2


class Notifier:
    """Tells webhooks what they asked to hear.

    Args:
        complain: told when one could not be reached; the event is then dropped. Called from several threads.
    """

    def __init__(self, mesh: str, webhooks: Sequence[Webhook], complain: Callable[[str], None]) -> None:
        self._mesh = mesh
        self._complain = complain
        self._queues: list[tuple[Webhook, queue.Queue[Event | None]]] = []
        self._threads: list[threading.Thread] = []
        for webhook in webhooks:
            waiting: queue.Queue[Event | None] = queue.Queue(_QUEUE)
            thread = threading.Thread(target=self._run, args=(webhook, waiting), daemon=True)
            thread.start()
            self._queues.append((webhook, waiting))
            self._threads.append(thread)

    def tell(self, event: Event) -> None:
        """Pass an event on; returns at once."""
        for webhook, waiting in self._queues:
            if wants(webhook, event):
                try:
                    waiting.put_nowait(event)
                except queue.Full:
                    self._complain(f"webhook '{webhook.name}' is too slow; an event was dropped")

    def close(self, timeout_s: float) -> None:
        """Let what is queued go out, for at most so long in all."""
        end = time.monotonic() + timeout_s
        for _, waiting in self._queues:
            with suppress(queue.Full):  # the webhook is too slow; its thread dies with the process
                waiting.put(None, timeout=max(0.0, end - time.monotonic()))
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self, webhook: Webhook, waiting: queue.Queue[Event | None]) -> None:
        import requests

        while (event := waiting.get()) is not None:
            body = json.dumps({"mesh": self._mesh, **event.to_json()})
            problem = ""
            for _ in range(_TRIES):
                try:
                    answer = requests.post(
                        webhook.url,
                        data=body,
                        headers={"Content-Type": "application/json", **webhook.headers},
                        timeout=webhook.timeout,
                        allow_redirects=False,
                    )
                    problem = "" if answer.ok else f"answered {answer.status_code}"
                except requests.RequestException as error:
                    # Not the error's text: it names the URL, which may carry a secret.
                    problem = type(error).__name__
                if not problem:
                    break
            if problem:
                self._complain(f"webhook '{webhook.name}' was not told of '{event.event}': {problem}")


def wants(webhook: Webhook, event: Event) -> bool:
    """Has this webhook asked for this event?"""
    if event.event == "acted" and event.remedy == "notify":
        return "notify" in webhook.events
    return event.event in webhook.events
