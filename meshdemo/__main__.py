"""`python -m meshdemo` and the `meshdemo` script: where every command starts, and may be interrupted."""

from __future__ import annotations

import sys
from typing import NoReturn


def run() -> NoReturn:
    """Run the command line; a Ctrl-C while its modules are still being loaded ends it without a traceback."""
    try:
        from meshdemo.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main.run()


if __name__ == "__main__":
    run()
