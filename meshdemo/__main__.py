"""`python -m meshdemo` and the `meshdemo` script: where every command starts, and may be interrupted."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line; a Ctrl-C while its modules are still being loaded ends it without a traceback."""
    try:
        from meshdemo.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        main.run()
    finally:
        # All is done and said: a Ctrl-C just now ends what Python has still to do, without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    run()
