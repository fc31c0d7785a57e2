"""What a policy may say, and its loader, which reports every problem with its line and column.

The policy is the part of watch that people edit, so being wrong must be cheap: a policy is checked whole,
all problems at once, and one with a problem never starts.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from meshdemo import durations, positions
from meshdemo.control.signals import effective_bound_ms
from meshdemo.errors import BadInput
from meshdemo.positions import Document, Problem

Scope = Literal["instance", "version", "service", "caller"]
Symptom = Literal["errors", "slow", "hung", "down"]
NotifyEvent = Literal["violated", "acted", "escalated", "blocked", "healed", "gave_up", "notify"]

SCOPES: tuple[str, ...] = get_args(Scope)
SYMPTOMS: tuple[str, ...] = get_args(Symptom)

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _duration_s(value: Any) -> float:
    if isinstance(value, str) and (seconds := durations.seconds(value.strip())) is not None:
        return seconds
    raise ValueError(f"{value!r} is no duration; write a number and a unit, such as 300ms, 10s, 5m or 1h")


def _share(value: Any) -> float:
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        return float(match[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"{value!r} is no share; write a percentage, such as 99%, or a number from 0 to 1")


Duration = Annotated[float, BeforeValidator(_duration_s)]
Share = Annotated[float, BeforeValidator(_share)]
# Below 100 %: an objective without any room for errors is violated by the first one.
Goal = Annotated[Share, Field(gt=0, lt=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-_A-Za-z0-9]{0,58}[A-Za-z0-9])?$")]
# A service by name; `app/service`: of that app alone.
ServicePattern = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9-]+/)?[a-z0-9*?\[\]!-]+$", max_length=120)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Latency(_Strict):
    """At least `share` of the requests are answered within `below`."""

    below: Annotated[Duration, Field(gt=0, le=60)] = Field(description="seconds")
    share: Goal


class _Selecting(_Strict):
    """Something that applies to some services."""

    services: list[ServicePattern] = Field(default_factory=lambda: ["*"], min_length=1)
    except_: list[ServicePattern] = Field(default_factory=list, alias="except")

    def of_app(self, app: str) -> Self | None:
        """The same for one app, its patterns without the app; None if it speaks of other apps only."""
        services = [name for name in (_within(app, pattern) for pattern in self.services) if name]
        except_ = [name for name in (_within(app, pattern) for pattern in self.except_) if name]
        return self.model_copy(update={"services": services, "except_": except_}) if services else None

    def applies_to(self, service: str) -> bool:
        """Does it speak of this service? A pattern that names an app fits none before `of_app`."""
        return any(fnmatchcase(service, pattern) for pattern in self.services) and not any(
            fnmatchcase(service, pattern) for pattern in self.except_
        )


def _within(app: str, pattern: str) -> str | None:
    """A pattern without the app that it names; None if that is another one."""
    named, _, service = pattern.rpartition("/")
    return service if named in ("", app) else None


class Objective(_Selecting):
    """What healthy means: one of `success`, `latency`, `in_service`."""

    name: Name
    success: Goal | None = Field(default=None, description="share of requests that are answered well")
    latency: Latency | None = None
    in_service: Annotated[Share, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the service's instances that are ready"
    )
    effective: bool = Field(default=False, description="judge what callers got after retries")
    window: Annotated[Duration, Field(ge=10, le=600)] = Field(
        default=60.0, description="seconds; the longest stretch judged as a whole, for slow burns"
    )
    min_requests: int = Field(default=40, ge=1, le=1_000_000)
    budget: Annotated[Duration, Field(ge=60, le=30 * 86_400)] = Field(
        default=3600.0, description="seconds; the period over which the error budget is counted"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Objective:
        if sum(kind is not None for kind in (self.success, self.latency, self.in_service)) != 1:
            raise ValueError("an objective has exactly one of: success, latency, in_service")
        if self.in_service is not None and self.effective:
            raise ValueError("'effective' is about requests, and this objective is about instances")
        return self

    @property
    def allowed(self) -> float:
        """The share of bad events that the objective allows, 0..1."""
        if self.success is not None:
            return 1 - self.success
        if self.latency is not None:
            return 1 - self.latency.share
        return 1 - (self.in_service or 0.0)

    @property
    def threshold_ms(self) -> float | None:
        """Slower than this is too slow; None unless this is about latency."""
        return None if self.latency is None else self.latency.below * 1000

    @property
    def text(self) -> str:
        """The objective in a few words."""
        after = " after retries" if self.effective else ""
        if self.latency is not None:
            return f"{self.latency.share * 100:g}% below {self.latency.below * 1000:g} ms{after}"
        if self.success is not None:
            return f"{self.success * 100:g}% answered well{after}"
        return f"{(self.in_service or 0) * 100:g}% of instances in service"


# -- remedies ---------------------------------------------------------------------------------------------


class Eject(_Strict):
    """Take the instance out of load balancing; it is let back in on probation."""

    kind: Literal["eject"] = "eject"


class Restart(_Strict):
    """Take the instance out of load balancing, replace its process, let it back in."""

    kind: Literal["restart"] = "restart"


class Rollback(_Strict):
    """Go back to the last revision of the workload that met its objectives."""

    kind: Literal["rollback"] = "rollback"


class ClearFault(_Strict):
    """End the faults that the mesh knows of and that hit this target."""

    kind: Literal["clear-fault"] = "clear-fault"


class ShiftAway(_Strict):
    """Send all traffic to the other versions."""

    kind: Literal["shift-away"] = "shift-away"


class Scale(_Strict):
    """Start more instances, up to `max`."""

    kind: Literal["scale"] = "scale"
    add: int = Field(default=1, ge=1, le=100)
    max: int = Field(default=5, ge=1, le=1000)


class Wait(_Strict):
    """Do nothing for a while: some things mend themselves."""

    kind: Literal["wait"] = "wait"
    for_: Annotated[Duration, Field(gt=0, le=3600)] = Field(default=5.0, alias="for")


class NotifyRemedy(_Strict):
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
REMEDIES: dict[str, type[_Strict]] = {
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


class Rule(_Selecting):
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


class MaxActions(_Strict):
    """At most `count` actions in any `per` seconds."""

    count: int = Field(ge=1, le=10_000)
    per: Annotated[Duration, Field(ge=1, le=86_400)]


class Guardrails(_Strict):
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


class Webhook(_Strict):
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


class Policy(_Strict):
    """A whole policy file."""

    objectives: list[Objective] = Field(min_length=1)
    rules: list[Rule] = Field(default_factory=list)
    guardrails: Guardrails = Guardrails()
    notify: list[Webhook] = Field(default_factory=list)

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


# -- loading ----------------------------------------------------------------------------------------------


class PolicyError(BadInput):
    """A policy file with problems; the message lists all of them."""

    def __init__(self, name: str, problems: list[Problem]) -> None:
        self.problems = problems
        lines = [f"{name}:{problem}" for problem in problems]
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        super().__init__("\n  ".join([f"{name} has {count}:", *lines]))


@dataclass(frozen=True, slots=True)
class Checked:
    """A policy text after checking: the policy, or what is wrong with it.

    `unset`: environment variables that it needs and that are not set here; they may be where watch runs.
    `remarks`: what is sound, and yet worth knowing.
    """

    policy: Policy | None
    problems: list[Problem]
    unset: Sequence[Problem] = ()
    remarks: Sequence[Problem] = ()


def load(path: Path, *, to_notify: bool = False) -> Policy:
    """Read and check a policy file. Raises PolicyError (exit status 2) with every problem in it.

    Args:
        to_notify: its webhooks will be told, so the variables that they need have to be set.
    """
    checked = check_file(path)
    if checked.policy is None:
        raise PolicyError(str(path), checked.problems)
    if to_notify and checked.unset:
        raise PolicyError(str(path), list(checked.unset))
    return checked.policy


def check_file(path: Path) -> Checked:
    """Check a policy file. Raises BadInput if there is none to read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read policy {path}: {error.strerror or error}") from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, len(before.rpartition(b"\n")[2].decode()) + 1
        return Checked(None, [Problem(line, column, f"not UTF-8 text: byte 0x{content[error.start]:02x}")])
    return check(text.replace("\r\n", "\n"))


def check(text: str, environment: Mapping[str, str] = os.environ) -> Checked:
    """Check a policy text; problems come in the order of their lines."""
    document = positions.parse(text)
    if document.data is None and not document.problems:
        return Checked(None, [Problem(1, 1, "the policy is empty; it needs at least one objective")])
    problems = list(document.problems)
    policy = None
    if document.data is not None:
        try:
            policy = Policy.model_validate(document.data)
        except ValidationError as error:
            problems.extend(_in_words(document, dict(detail)) for detail in error.errors(include_url=False))
        # Also when the above found something: all problems at once, not one after the other.
        problems.extend(_references(document))
    if problems or policy is None:
        return Checked(None, sorted(set(problems)))
    unset = sorted(_unset(document, policy, environment))
    return Checked(policy, [], unset, sorted(_inexact(document, policy)))


def _unset(document: Document, policy: Policy, environment: Mapping[str, str]) -> Iterator[Problem]:
    for index, webhook in enumerate(policy.notify):
        for place, names in webhook.variables().items():
            for name in names:
                if name not in environment:
                    where = document.value_at(("notify", index, *place))
                    yield Problem(*where, f"the environment variable {name} is not set")


def _inexact(document: Document, policy: Policy) -> Iterator[Problem]:
    """Latencies that lie within a bucket of the histograms."""
    for index, objective in enumerate(policy.objectives):
        if (threshold := objective.threshold_ms) is None:
            continue
        bound = effective_bound_ms(threshold)
        if not math.isclose(bound, threshold):
            where = document.value_at(("objectives", index, "latency", "below"))
            yield Problem(*where, f"{threshold:g}ms is judged as {bound:g}ms, the nearest that is counted")


def _in_words(document: Document, error: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors as a problem."""
    path = [step for step in error["loc"] if step not in ("function-before",)]
    kind, key = error["type"], str(error["loc"][-1]) if error["loc"] else ""
    given = error.get("input")
    match kind:
        case "extra_forbidden":
            return Problem(*document.key_at(path), _unknown_key(document.data, path))
        case "missing":
            message = f"'{key}' is missing"
            path = path[:-1]
        case "union_tag_invalid":
            name = str(given.get("kind")) if isinstance(given, Mapping) else str(given)
            message = f"unknown remedy '{name}'; {_one_of(name, REMEDIES)}"
        case "union_tag_not_found" | "model_attributes_type" if "remedies" in path:
            message = f"a remedy is one word, or one word with its settings; {_one_of('', REMEDIES)}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
            message = f"unknown {_singular(path)} '{given}'; {_one_of(str(given), allowed)}"
        case "string_pattern_mismatch":
            message = f"{_singular(path)} '{given}' has characters that are not allowed there"
        case "value_error":
            message = str(error["ctx"]["error"])
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            raw = positions.lookup(document.data, path)
            message = f"'{key}' is {raw}, but must be {_bound(kind, error['ctx'], path)}"
        case "too_short":
            message = f"'{key}' must not be empty"
        case "model_type" | "dict_type" | "model_attributes_type":
            message = f"{_what(path)} must have keys and values, not {_kind_of(given)}"
        case "list_type":
            message = f"{_what(path)} must be a list, not {_kind_of(given)}"
        case "int_type" | "int_parsing" | "int_from_float":
            message = f"{_what(path)} must be a whole number, not {given!r}"
        case "string_type":
            message = f"{_what(path)} must be text, not {given!r}"
        case "bool_type":
            message = f"{_what(path)} must be true or false, not {given!r}"
        case _:
            message = f"{_what(path)}: {error['msg']}"
    return Problem(*document.value_at(path), message)


def _what(path: list[Any]) -> str:
    names = [str(step) for step in path if isinstance(step, str)]
    if not names:
        return "the policy"
    if isinstance(path[-1], int):
        return f"an entry of '{names[-1]}'"
    return f"'{names[-1]}'"


def _singular(path: list[Any]) -> str:
    name = next((str(step) for step in reversed(path) if isinstance(step, str)), "value")
    return name.removesuffix("s") if name not in ("success",) else name


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "nothing" if value is None else repr(value)


def _bound(kind: str, context: Mapping[str, Any], path: list[Any]) -> str:
    limit = next(iter(context.values()))
    words = {
        "greater_than": "more than",
        "greater_than_equal": "at least",
        "less_than": "less than",
        "less_than_equal": "at most",
    }[kind]
    if path and path[-1] in ("success", "share", "in_service", "min_in_service"):
        return f"{words} {limit * 100:g}%"
    if path and path[-1] in _DURATIONS:
        return f"{words} {limit:g}s"
    return f"{words} {limit:g}"


_DURATIONS = ("below", "window", "budget", "per", "cooldown", "verify", "probation", "timeout", "for")


def _one_of(name: str, allowed: Any) -> str:
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


def _unknown_key(data: Any, path: list[Any]) -> str:
    """The words for an unknown key, with the nearest one that is allowed there."""
    parts = [step for step in path if isinstance(step, str)]
    key = parts[-1]
    model: type[BaseModel] = Policy
    for step in parts[:-1]:
        model = (REMEDIES if model is Rule else _MODELS).get(step, model)
    allowed = [field.alias or name for name, field in model.model_fields.items() if name != "kind"]
    if not allowed:
        return f"unknown key '{key}'; {parts[-2]} has no settings"
    return f"unknown key '{key}'; {_one_of(key, allowed)}"


_MODELS: dict[str, type[BaseModel]] = {
    "objectives": Objective,
    "latency": Latency,
    "rules": Rule,
    "guardrails": Guardrails,
    "max_actions": MaxActions,
    "notify": Webhook,
}


def _references(document: Document) -> Iterator[Problem]:
    """Names used twice, names that lead nowhere, and rules that can never be reached."""
    data = document.data
    if not isinstance(data, Mapping):
        return
    names: dict[str, set[str]] = {}
    for section in ("objectives", "rules", "notify"):
        names[section] = set()
        for index, entry in enumerate(_entries(data, section)):
            name = entry.get("name") if isinstance(entry, Mapping) else None
            if not isinstance(name, str):
                continue
            if name in names[section]:
                place = document.value_at((section, index, "name"))
                yield Problem(*place, f"the name '{name}' is taken by another of the {section}")
            names[section].add(name)
    for index, rule in enumerate(_entries(data, "rules")):
        wanted = rule.get("objectives") if isinstance(rule, Mapping) else None
        for position, name in enumerate(wanted if isinstance(wanted, list) else ()):
            if isinstance(name, str) and name not in names["objectives"]:
                place = document.value_at(("rules", index, "objectives", position))
                hint = _one_of(name, sorted(names["objectives"]))
                yield Problem(*place, f"unknown objective '{name}'; {hint}")
    yield from _unreachable(document)


def _unreachable(document: Document) -> Iterator[Problem]:
    """Rules hidden by one above them that takes everything they would."""
    open_scopes: dict[str, str] = {}
    for index, rule in enumerate(_entries(document.data, "rules")):
        if not isinstance(rule, Mapping):
            continue
        scopes = rule.get("scope")
        scopes = [scopes] if isinstance(scopes, str) else scopes if isinstance(scopes, list) else []
        scopes = [scope for scope in scopes if scope in SCOPES]
        if scopes and all(scope in open_scopes for scope in scopes):
            place = document.value_at(("rules", index))
            above = open_scopes[scopes[0]]
            yield Problem(*place, f"never reached: rule '{above}' above takes everything of this scope")
        if not any(rule.get(key) for key in ("services", "except", "objectives", "symptom")):
            open_scopes.update({scope: str(rule.get("name")) for scope in scopes if scope not in open_scopes})


def _entries(data: Mapping[str, Any], section: str) -> list[Any]:
    value = data.get(section)
    return value if isinstance(value, list) else []
