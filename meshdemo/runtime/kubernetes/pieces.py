"""What manifests are put together from: the templates, what each of them may speak of, and a sidecar.

Apart from the rest, for `inject` needs no more than this and starts faster so.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jinja2
import yaml

from meshdemo import names
from meshdemo.resources import TEMPLATES

APP_USER = 65532
SIDECAR_USER = 1337
# Where containers find things.
CONFIG_FOLDER = "/etc/meshdemo"
RUN_FOLDER = "/run/meshdemo"
STATE_FOLDER = "/var/lib/meshdemo"
API_FOLDER = "/run/secrets/meshdemo"

PORTS = {
    "inbound": names.INBOUND_PORT, "outbound": names.OUTBOUND_PORT, "plain": names.PLAIN_PORT,
    "ready": names.READY_PORT, "xds": names.XDS_PORT, "api": names.API_PORT, "open": names.OPEN_PORT,
    "gateway": names.GATEWAY_PORT,
}  # fmt: skip


def sidecar(
    mesh: str, image: str, *, skip_inbound: tuple[int, ...] = (), skip_outbound: tuple[int, ...] = ()
) -> dict[str, Any]:
    """What makes any pod a meshed one: `init_containers` and `volumes`.

    Args:
        image: of the sidecar.
        skip_inbound, skip_outbound: ports whose traffic passes by the sidecar.
    """
    rules = redirect_rules(skip_inbound=skip_inbound, skip_outbound=skip_outbound)
    values = {
        **common(mesh), "handout": names.handout(mesh), "images": {"sidecar": image}, "redirect_rules": rules,
    }  # fmt: skip
    text = environment().get_template("kubernetes/inject.yaml.j2").render(values)
    found: dict[str, Any] = yaml.load(text, Loader=Loader)  # noqa: S506 - a safe loader
    return found


def redirect_rules(*, skip_inbound: tuple[int, ...] = (), skip_outbound: tuple[int, ...] = ()) -> str:
    """What iptables-restore is given in a pod. `skip_*`: ports whose traffic passes by the sidecar."""
    template = environment().get_template("kubernetes/redirect.rules.j2")
    rules = template.render(
        ports=PORTS, sidecar_user=SIDECAR_USER, skip_inbound=skip_inbound, skip_outbound=skip_outbound
    )
    return f"{rules.strip()}\n"


def common(mesh: str) -> dict[str, Any]:
    """What every template may speak of."""
    return {
        "mesh": mesh,
        "ports": PORTS,
        "audience": names.AUDIENCE,
        "app_user": APP_USER,
        "sidecar_user": SIDECAR_USER,
        "sidecar_args": [
            "--config-path", f"{CONFIG_FOLDER}/bootstrap.yaml", "--service-node", "$(POD_NAME)",
            "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning",
            # As on the local runtime: its warnings of deprecated fields say the same with every push.
            "--component-log-level", "misc:error",
        ],
        "folders": {"config": CONFIG_FOLDER, "run": RUN_FOLDER, "state": STATE_FOLDER, "api": API_FOLDER},
    }  # fmt: skip


@cache
def environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - YAML; values go through tojson
    )


Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
