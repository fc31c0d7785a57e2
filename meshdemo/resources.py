"""Where the files that are data live: `templates/` and `policy.yaml`.

In a checkout they are at its top level; in a wheel they are carried inside the package (`_data`), so that
an installed meshdemo works from any directory.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_CARRIED = _PACKAGE / "_data"
ROOT = _CARRIED if _CARRIED.is_dir() else _PACKAGE.parent

TEMPLATES = ROOT / "templates"
DEFAULT_POLICY = ROOT / "policy.yaml"
