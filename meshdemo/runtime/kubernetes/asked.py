"""What one `up` on a cluster asks for: what the user says, and what he does not say as it was."""

from __future__ import annotations

import time
from dataclasses import replace

from meshdemo.apps.model import GATEWAY
from meshdemo.control.discovered import declared
from meshdemo.errors import BadInput, Failed
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.kubernetes import images, manifests, record
from meshdemo.runtime.kubernetes.record import Record
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.local.ports import check_gateway_port

WATCH = "watch"
_SAY_WHY_S = 2.0  # so long before the time is over a step gives up, to say why


class Asked:
    """Wrong options are refused when it is made: raises BadInput, Failed.

    Args:
        kind: the runtime's, `kind` or `kubernetes`.
    """

    def __init__(self, kind: str, options: UpOptions) -> None:
        # What was injected is shown as part of the app, and is not ours to bring up.
        self.options = options = replace(options, app=declared(options.app))
        self.name, self.extra = options.name, options.extra
        self.on_kind = kind == "kind"
        self.deadline = time.monotonic() + max(options.timeout_s - _SAY_WHY_S, options.timeout_s / 2)
        self.before = before = record.load(options.name)
        if before is not None and before.kind != kind:
            raise Failed(
                f"mesh '{options.name}' runs on the runtime '{before.kind}', not '{kind}'",
                f"run `meshdemo down --name {options.name}` first, or use another --name",
            )
        base_image = self.extra.get("base_image") or (before.base_image if before else None)
        self.registry: str | None = self.extra.get("registry") or (before.registry if before else None)
        for value in (base_image, self.registry):
            if value:
                images.check_reference(value)
        self._base_image = base_image
        self.observes = self._asked("observability", before.observability if before else True)
        self.watches = self._asked("watch", before.watch if before else False)
        self.recipes = images.recipes(options.app, base_image or images.BASE_IMAGE)
        self.references = {name: recipe.reference(self.registry) for name, recipe in self.recipes.items()}
        self.wanted(None)
        self._check_gateway_port()

    def _asked(self, name: str, otherwise: bool) -> bool:
        asked = self.extra.get(name)
        return otherwise if asked is None else bool(asked)

    def _check_gateway_port(self) -> None:
        """Raises BadInput for a port that cannot be had."""
        asked = self.extra.get("gateway_port")
        if asked is None:
            return
        if not self.on_kind:
            raise BadInput(
                f"--gateway-port {asked}: there is no such port on the runtime 'kubernetes'",
                "reach the gateway with `kubectl port-forward`, an Ingress or a Service of your own",
            )
        before = self.before
        if before is None:
            check_gateway_port(asked)
        elif before.ports.get(GATEWAY) != asked:
            now = before.ports.get(GATEWAY)
            raise BadInput(
                f"--gateway-port {asked}: the kind cluster '{before.cluster}' has "
                + (f"its gateway at port {now}" if now else "no port for it"),
                "ports are given when the cluster is made: `meshdemo down` first, or leave the option out",
            )

    def wanted(self, running: specs.MeshSpec | None) -> specs.MeshSpec:
        """The spec to bring up, given the one that runs. Raises BadInput."""
        return specs.wanted(self.options, running, now=time.time(), runs_images=True)

    @property
    def workers(self) -> int:
        """The nodes of a kind cluster besides its first."""
        return int(self.extra.get("workers") or 0)

    @property
    def context(self) -> str | None:
        """Of the kubeconfig; None: its current one."""
        return self.extra.get("context") or (self.before.context if self.before else None)

    @property
    def left_out(self) -> set[str]:
        """Parts that are not to run."""
        observability = () if self.observes else manifests.OBSERVABILITY
        return {*observability, *(() if self.watches else (WATCH,))}

    def left_s(self) -> float:
        """Seconds until the time that the user gave is over."""
        return max(1.0, self.deadline - time.monotonic())

    def remember(self, now: Record) -> None:
        """Write down what `down` may remove, and what the next `up` goes on with. Raises Failed, BadInput."""
        said = {
            "registry": self.registry, "base_image": self._base_image,
            "observability": self.observes, "watch": self.watches,
        }  # fmt: skip
        record.save(now.model_copy(update=said))
