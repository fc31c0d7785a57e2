"""What a policy may say; policyfile.py reads one and reports what is wrong with it.

Objectives are told of elsewhere (`meshdemo.control.goals`): they are what the dashboard judges by, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, model_validator

from meshdemo.control.goals import Duration, Name, Objective, Selecting, Share, Strict
from meshdemo.errors import BadInput

Scope = Literal["instance", "version", "service", "caller"]
Symptom = Literal["errors", "slow", "hung", "down"]
NotifyEvent = Literal["violated", "acted", "escalated", "blocked", "healed", "gave_up", "notify"]

SCOPES: tuple[str, ...] = get_args(Scope)

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


# -- remedies ---------------------------------------------------------------------------------------------


class Eject(Strict):
    """Take the instance out of load balancing; it is let back in on probation."""

    kind: Literal["eject"] = "eject"


class Restart(Strict):
    """Take the instance out of load balancing, replace its process, let it back in."""

    kind: Literal["restart"] = "restart"


class Rollback(Strict):
    """Go back to the last revision of the workload that met its objectives."""

    kind: Literal["rollback"] = "rollback"


class ClearFault(Strict):
    """End the faults that the mesh knows of and that hit this target."""

    kind: Literal["clear-fault"] = "clear-fault"


class ShiftAway(Strict):
    """Send all traffic to the other versions."""

    kind: Literal["shift-away"] = "shift-away"


class Scale(Strict):
    """Start more instances, up to `max`."""

    kind: Literal["scale"] = "scale"
    add: int = Field(default=1, ge=1, le=100)
    max: int = Field(default=5, ge=1, le=1000)


class Wait(Strict):
    """Do nothing for a while: some things mend themselves."""

    kind: Literal["wait"] = "wait"
    for_: Annotated[Duration, Field(gt=0, le=3600)] = Field(default=5.0, alias="for")


class NotifyRemedy(Strict):
    """Tell the webhooks under `notify`, then go on."""

    kind: Literal["notify"] = "notify"


def _remedy(value: Any) -> Any:
    """`eject` and `scale: {add: 2}` are how people write {kind: eject} and {kind: scale, add: 2}."""
    if isinstance(value, str):
        return {"kind": value}
    if isinstance(value, Mapping) and len(value) == 1:
        kind, settings = next(iter(value.items()))
        if settings is None or isinstance(settings, Mapping):
            return {**(settings or {}), "kind": kind}
    return value


Remedy = Annotated[
    Eject | Restart | Rollback | ClearFault | ShiftAway | Scale | Wait | NotifyRemedy,
    Discriminator("kind"),
]
REMEDIES: dict[str, type[Strict]] = {
    "eject": Eject,
    "restart": Restart,
    "rollback": Rollback,
    "clear-fault": ClearFault,
    "shift-away": ShiftAway,
    "scale": Scale,
    "wait": Wait,
    "notify": NotifyRemedy,
}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Rule(Selecting):
    """What to do about a violated objective, by where the cause is."""

    name: Name
    scope: Annotated[list[Scope], BeforeValidator(_listed), Field(min_length=1)]
    objectives: list[str] = Field(default_factory=list, description="names; empty: whichever")
    symptom: Symptom | None = None
    remedies: list[Annotated[Remedy, BeforeValidator(_remedy)]] = Field(min_length=1)

    def fits(self, *, scope: str, service: str, objective: str, symptom: str) -> bool:
        """Is the rule meant for this?"""
        return (
            scope in self.scope
            and self.applies_to(service)
            and (not self.objectives or objective in self.objectives)
            and self.symptom in (None, symptom)
        )


# -- the rest ---------------------------------------------------------------------------------------------


class MaxActions(Strict):
    """At most `count` actions in any `per` seconds."""

    count: int = Field(ge=1, le=10_000)
    per: Annotated[Duration, Field(ge=1, le=86_400)]


class Guardrails(Strict):
    """What watch must not do, whatever the rules say."""

    cooldown: Annotated[Duration, Field(ge=0, le=86_400)] = Field(
        default=60.0, description="seconds until the same remedy may be used on the same target again"
    )
    max_actions: MaxActions = Field(default=MaxActions.model_validate({"count": 10, "per": "10m"}))
    min_in_service: Annotated[Share, Field(ge=0, le=1)] = Field(
        default=0.5, description="share of a service's instances that must stay in load balancing"
    )
    verify: Annotated[Duration, Field(ge=1, le=600)] = Field(
        default=3.0, description="seconds of good signals after a remedy before it counts as successful"
    )
    probation: Annotated[Duration, Field(ge=1, le=86_400)] = Field(
        default=30.0, description="seconds that an ejected instance stays out before it may come back"
    )


class Webhook(Strict):
    """Where to tell people. `${NAME}` in url and headers is taken from the environment, for secrets."""

    name: Name
    url: Annotated[str, StringConstraints(min_length=1)]
    headers: dict[str, str] = Field(default_factory=dict)
    events: list[NotifyEvent] = Field(
        default_factory=lambda: list[NotifyEvent](["violated", "healed", "gave_up", "notify"]), min_length=1
    )
    timeout: Annotated[Duration, Field(gt=0, le=60)] = 2.0

    @model_validator(mode="after")
    def _http(self) -> Webhook:
        if not self.url.startswith("${") and (problem := _url_problem(_VARIABLE.sub("1", self.url))):
            raise ValueError(f"url '{self.url}' {problem}")
        return self

    def variables(self) -> dict[tuple[str, ...], list[str]]:
        """The environment variables that it needs, by where they stand."""
        texts: dict[tuple[str, ...], str] = {("url",): self.url}
        texts.update({("headers", key): text for key, text in self.headers.items()})
        return {place: _VARIABLE.findall(text) for place, text in texts.items()}

    def resolved(self, environment: Mapping[str, str]) -> Webhook:
        """The webhook with its variables filled in. Raises BadInput naming one that is not set."""

        def fill(text: str) -> str:
            def value(match: re.Match[str]) -> str:
                if match[1] not in environment:
                    raise BadInput(
                        f"notify '{self.name}' needs the environment variable {match[1]}, which is not set",
                        f"set {match[1]}, or take the webhook out of the policy",
                    )
                return environment[match[1]]

            return _VARIABLE.sub(value, text)

        if problem := _url_problem(fill(self.url)):  # not the URL itself: it may carry a secret
            raise BadInput(f"the url of notify '{self.name}', with its variables filled in, {problem}")
        return self.model_copy(
            update={"url": fill(self.url), "headers": {k: fill(v) for k, v in self.headers.items()}}
        )


def _url_problem(url: str) -> str:
    """What keeps a webhook from being told at this URL; empty if nothing does."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        return f"makes no sense: {error}"
    if parts.scheme not in ("http", "https"):
        return "is not http:// or https://"
    if not host or any(character.isspace() for character in url):
        return "names no host" if not host else "has a space in it"
    return "has a port that nothing can listen on" if port == 0 else ""


class Policy(Strict):
    """A whole policy file."""

    objectives: list[Objective] = Field(min_length=1)
    rules: list[Rule] = Field(default_factory=list)
    guardrails: Guardrails = Guardrails()
    notify: list[Webhook] = Field(default_factory=list)

    def apps(self) -> set[str]:
        """The apps that it names."""
        return {app for one in (*self.objectives, *self.rules) for app in one.apps()}

    def of_app(self, app: str) -> Policy:
        """What of the policy is meant for this app."""
        return self.model_copy(
            update={
                "objectives": [one for objective in self.objectives if (one := objective.of_app(app))],
                "rules": [kept for rule in self.rules if (kept := rule.of_app(app))],
            }
        )

    def of_service(self, service: str) -> Policy:
        """What of the policy of an app (`of_app`) is about this service: its objectives."""
        here = {"services": [service], "except_": []}
        return self.model_copy(
            update={"objectives": [one.model_copy(update=here) for one in self.objectives_of(service)]}
        )

    def objectives_of(self, service: str) -> list[Objective]:
        """The objectives that apply to a service, in the order of the file."""
        return [objective for objective in self.objectives if objective.applies_to(service)]

    def rule_for(self, *, scope: str, service: str, objective: str, symptom: str) -> Rule | None:
        """The first rule that fits."""
        for rule in self.rules:
            if rule.fits(scope=scope, service=service, objective=objective, symptom=symptom):
                return rule
        return None

    def webhooks(self, environment: Mapping[str, str] = os.environ) -> list[Webhook]:
        """The webhooks with their variables filled in."""
        return [webhook.resolved(environment) for webhook in self.notify]
