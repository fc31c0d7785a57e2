"""How often Python looks for garbage: for objects that nothing refers to but each other."""

from __future__ import annotations

import gc

_LEAST = 50_000
_EACH = 60  # what is made to send a stream something, and to take its answer, and is not freed until all have


def expect_streams(count: int) -> None:
    """Have garbage looked for less often than once in the time that so many streams are each sent something.

    That makes objects by the dozen for each, next to none of them in cycles, and each look passes over all
    that there are: with Python's defaults a seventh of a push to 1,000 sidecars went into it, and with what
    is enough for these, a tenth of one to 5,000.
    """
    gc.set_threshold(max(_LEAST, _EACH * count), 20, 50)
