"""What a view works with: the mesh, and what its request says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from flask import current_app, request
from pydantic import BaseModel, ConfigDict, ValidationError

from meshdemo.control.api.mesh import Control
from meshdemo.control.model import Effect
from meshdemo.errors import BadInput

MAX_WAIT_S = 30.0


def control() -> Control:
    """The mesh that the current request is about."""
    return cast(Control, current_app.extensions["meshdemo"])


_View = TypeVar("_View", bound=Callable[..., Any])


def open_to_all(view: _View) -> _View:
    """Mark a view that needs no token; the Host header is checked all the same."""
    view.open_to_all = True  # type: ignore[attr-defined]
    return view


class Body(BaseModel):
    """The body of a request: these fields, of these types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


_B = TypeVar("_B", bound=Body)


def json_object() -> dict[str, Any]:
    """The request's body, which is a JSON object.

    Raises:
        BadInput: it is not.
    """
    if not request.is_json:
        raise BadInput("the body is not application/json", "send a JSON object")
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise BadInput("the body is no JSON object", 'such as {"service": "service-b"}')
    return body


def body(model: type[_B]) -> _B:
    """The request's body.

    Raises:
        BadInput: it is not what `model` says, and in what.
    """
    try:
        return model.model_validate(json_object())
    except ValidationError as error:
        raise BadInput(
            "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()),
            f"fields: {', '.join(model.model_fields)}",
        ) from error


def number(name: str, default: float, low: float, high: float) -> float:
    """A number of the query, between these bounds. Raises BadInput."""
    given = request.args.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadInput(f"{name} '{given}' is out of range", f"a number, {low:g} to {high:g}")
    return value


def sequence() -> int:
    """The sequence number after which the caller wants to hear. Raises BadInput."""
    given = request.args.get("after", "0")
    try:
        return int(given)
    except ValueError:
        raise BadInput(f"after '{given}' is no sequence number", "a whole number") from None


def effect_row(effect: Effect) -> dict[str, Any]:
    """How a change came into force, as part of an answer."""
    return {"effect": effect.model_dump(mode="json")}


def dumped(values: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """Values as JSON."""
    return [value.model_dump(mode="json") for value in values]
