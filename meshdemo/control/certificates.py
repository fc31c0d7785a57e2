"""The certificates of sidecars and of the control plane's own server, those in use, as secrets for SDS."""

from __future__ import annotations

from collections.abc import Callable, Collection

import grpc
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret

from meshdemo.control import xds
from meshdemo.control.identity import Authority, Certificate, spiffe_id
from meshdemo.control.model import Instance, MeshState


class Certificates:
    """Those that are in use; each is issued when it is first asked for."""

    def __init__(self, authority: Authority, lifetime_s: float, clock: Callable[[], float]) -> None:
        """`lifetime_s`: of each; `clock`: seconds since the epoch."""
        self._authority, self._lifetime_s, self._clock = authority, lifetime_s, clock
        self._issued: dict[str, tuple[Certificate, xds.Bundle]] = {}
        self.server = self._issue_server()
        self.trust = self._trust()

    @property
    def lifetime_s(self) -> float:
        """How long those are valid that are issued from now on."""
        return self._lifetime_s

    def set_lifetime(self, lifetime_s: float) -> bool:
        """Have all issued anew if they are to live shorter or longer from now on; are they?"""
        if lifetime_s == self._lifetime_s:
            return False
        self._lifetime_s = lifetime_s
        self.reissue()
        return True

    def of(self, instance: Instance, mesh: MeshState) -> tuple[Certificate, xds.Bundle]:
        """The certificate of an instance, and the secret that its sidecar gets it as."""
        found = self._issued.get(instance.id)
        if found is None:
            identity = spiffe_id(mesh.mesh, mesh.namespace, instance.service)
            certificate = self._authority.issue(identity, self._clock(), self._lifetime_s)
            secret = Secret(name="identity")
            secret.tls_certificate.certificate_chain.inline_bytes = certificate.chain
            secret.tls_certificate.private_key.inline_bytes = certificate.key
            found = (certificate, xds.Bundle({"identity": xds.encode(xds.SECRETS, secret)}))
            self._issued[instance.id] = found
        return found

    def expires_at(self, instance: str) -> float | None:
        """Until when an instance's certificate is valid; None while it has none."""
        known = self._issued.get(instance)
        return known[0].expires_at if known else None

    def forget(self, instance: str) -> None:
        """Have an instance's certificate issued anew when it is next asked for."""
        self._issued.pop(instance, None)

    def retain(self, instances: Collection[str]) -> None:
        """Forget those of all other instances."""
        self._issued = {name: known for name, known in self._issued.items() if name in instances}

    def reissue(self) -> None:
        """Have all issued anew."""
        self._issued.clear()
        self.server = self._issue_server()

    def renew_due(self) -> bool:
        """Have those issued anew of whose lifetime about two thirds are over; is a sidecar's among them?"""
        now = self._clock()
        if self.server.renew_at <= now:
            self.server = self._issue_server()
        due = [instance for instance, (certificate, _) in self._issued.items() if certificate.renew_at <= now]
        for instance in due:
            self.forget(instance)
        return bool(due)

    def trust_anew(self) -> None:
        """Take over whom the authority trusts now."""
        self.trust = self._trust()

    def server_credentials(self) -> grpc.ServerCredentials:
        """TLS for the gRPC server, from the mesh's own authority; follows the rotation of its certificate."""
        first = self.server
        served = first

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Called for each handshake, on a thread of gRPC; None: as before."""
            nonlocal served
            if served is self.server:
                return None
            served = self.server
            return grpc.ssl_server_certificate_configuration([(served.key, served.chain)])

        return grpc.dynamic_ssl_server_credentials(
            grpc.ssl_server_certificate_configuration([(first.key, first.chain)]), fetch
        )

    def _issue_server(self) -> Certificate:
        return self._authority.issue_control_plane(self._clock(), self._lifetime_s)

    def _trust(self) -> xds.Bundle:
        secret = Secret(name="trust")
        secret.validation_context.trusted_ca.inline_bytes = self._authority.trust
        return xds.Bundle({"trust": xds.encode(xds.SECRETS, secret)})
