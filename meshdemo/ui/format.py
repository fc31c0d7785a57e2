"""Figures as people read them: rates, shares, latencies, times, sparklines. Pure text, no terminal.

Figures keep a steady width, so that a live table does not jump, and never look better than they are: a
success rate below one is never shown as 100 %.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

NOTHING = "-"
_BARS = "▁▂▃▄▅▆▇█"


def rate(per_s: float | None) -> str:
    """Requests per second: `0.4`, `12.5`, `120`, `1.2k`."""
    if per_s is None:
        return NOTHING
    if per_s >= 9_999.5:
        return f"{per_s / 1000:.0f}k"
    if per_s >= 999.5:
        return f"{per_s / 1000:.1f}k"
    return f"{per_s:.0f}" if per_s >= 99.95 or per_s == 0 else f"{per_s:.1f}"


def percent(share: float | None, digits: int = 2) -> str:
    """A share (0..1) as a percentage, rounded down: 0.99999 is `99.99%`, only 1 is `100%`."""
    if share is None:
        return NOTHING
    if share >= 1:
        return "100%"
    scale = 10**digits
    # The addend keeps 0.29 (0.28999... in binary) from becoming 28.99.
    steps = min(math.floor(share * 100 * scale + 1e-7), 100 * scale - 1)
    return f"{steps / scale:.{digits}f}%"


def size(count: int | None) -> str:
    """A number of bytes: `0`, `512B`, `1.5kB`, `12MB`; nothing at all is `-`."""
    if not count:
        return NOTHING
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.1f}{units[0]}" if value < 9.95 and units[0] != "B" else f"{value:.0f}{units[0]}"


def latency(ms: float | None) -> str:
    """A latency with its unit: `0.4ms`, `12ms`, `1.2s`."""
    if ms is None:
        return NOTHING
    if ms < 9.95:
        return f"{ms:.1f}ms"
    return f"{ms:.0f}ms" if ms < 999.5 else f"{ms / 1000:.1f}s"


def duration(seconds: float | None) -> str:
    """A length of time: `0.8s`, `45s`, `2m05s`, `3h02m`."""
    if seconds is None:
        return NOTHING
    if seconds < 9.95:
        return f"{max(seconds, 0):.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def clock(at: float) -> str:
    """A point in time (seconds since the epoch) as local wall clock time."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def sparkline(values: Sequence[float | None], width: int, top: float | None = None) -> str:
    """The last `width` values as bars from 0 to `top` (default: the largest of them); gaps are blank."""
    if width <= 0:
        return ""
    shown = list(values)[-width:]
    known = [value for value in shown if value is not None]
    highest = top if top is not None else max(known, default=0.0)
    bars = "".join(_bar(value, highest) for value in shown)
    return bars.rjust(width)


def _bar(value: float | None, highest: float) -> str:
    if value is None:
        return " "
    if value <= 0 or highest <= 0:
        return _BARS[0]
    # The lowest bar is nought and nothing else, so that one bad request in a hundred still shows.
    step = math.ceil(value / highest * (len(_BARS) - 1))
    return _BARS[max(1, min(step, len(_BARS) - 1))]


def meter(share: float, width: int) -> str:
    """A share (0..1) as a bar of `width` cells, with words left to the caller."""
    full = round(max(0.0, min(share, 1.0)) * width)
    return "█" * full + "░" * (width - full)
