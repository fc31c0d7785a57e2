"""Values that users type: durations, shares, splits. Text in, numbers or BadInput out; pure.

Each complaint is one line that names the option, what was typed and what is allowed.
"""

from __future__ import annotations

import math

from meshdemo import durations
from meshdemo.errors import BadInput


def duration_s(text: str, what: str) -> float:
    """Seconds of a duration such as `30s`, `500ms`, `2m` or `1m30s`; it must be more than zero.

    Args:
        text: what was typed.
        what: the option, for the complaint.
    """
    seconds = durations.seconds(text)
    if seconds is None or not 0 < seconds < math.inf:
        raise BadInput(f"{what} {text!r}: give a duration above zero, such as 500ms, 30s, 2m or 1m30s")
    return seconds


def number(value: float, what: str, low: float, high: float, unit: str = "") -> float:
    """`value`, if it lies in [low, high] (and is no NaN)."""
    if not low <= value <= high:
        limits = f"{low:g} to {high:g}{' ' + unit if unit else ''}"
        raise BadInput(f"{what} {value:g}: allowed is {limits}")
    return value + 0.0  # -0 is 0


def split(text: str, what: str = "--split") -> dict[str, int]:
    """Weights by version of `v1=90,v2=10`; whole numbers that sum to 100."""
    weights = {version: float(weight) for version, weight in _pairs(text, what, "v1=90,v2=10").items()}
    if any(weight != int(weight) or weight < 0 for weight in weights.values()):
        raise BadInput(f"{what} {text!r}: weights are whole numbers from 0 to 100")
    if sum(weights.values()) != 100:
        raise BadInput(f"{what} {text!r}: the weights sum to {sum(weights.values()):g}, not to 100")
    return {version: int(weight) for version, weight in weights.items()}


def mirror(text: str, what: str = "--mirror") -> dict[str, float]:
    """Share by version of `v2=0.1`; 0 ends the mirroring of that version."""
    shares = _pairs(text, what, "v2=0.1")
    for share in shares.values():
        number(share, f"{what} {text!r}: share", 0, 1)
    return shares


def _pairs(text: str, what: str, example: str) -> dict[str, float]:
    pairs: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        try:
            parsed = float(value)
        except ValueError:
            parsed = math.nan
        if not name or not equals or not math.isfinite(parsed) or name in pairs:
            raise BadInput(f"{what} {text!r}: write it as {example}")
        pairs[name] = parsed
    return pairs
