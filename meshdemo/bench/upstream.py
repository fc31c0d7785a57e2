"""What is called in the benchmark: an Envoy that answers at once. A workload's command: from PORT and FOLDER.

A Python program would cost more than the two proxies in front of it, and hide what they cost.
"""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Template

from meshdemo.control.bootstrap import envoy_arguments, find_envoy
from meshdemo.resources import TEMPLATES


def main() -> None:
    """Become that Envoy."""
    template = Template((TEMPLATES / "bench" / "upstream.yaml.j2").read_text())
    port = int(os.environ["PORT"])
    path = Path(os.environ["FOLDER"]) / f"upstream-{port}.yaml"
    path.write_text(template.render(port=port))
    os.setsid()  # its share of the processors is its own, not that of the mesh (see `Stage.start`)
    command = envoy_arguments(find_envoy(), path)
    os.execv(command[0], command)  # noqa: S606 (no shell is what is meant)


if __name__ == "__main__":
    main()
