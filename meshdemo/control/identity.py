"""Who is who in the mesh: its certificate authority, and whom a token belongs to.

The control plane is the authority. Its root key lives in the state folder, readable by its owner only, and
survives restarts. Each instance gets a key and a certificate of its own that say which service it belongs
to (a SPIFFE identity, https://github.com/spiffe/spiffe/blob/main/standards/X509-SVID.md); they live for an
hour and are replaced well before that. The root can be replaced too, without a moment in which one half of
the mesh does not trust the other: `prepare_root` (trust both), `switch_root` (sign with the new one),
`retire_root` (trust the new one alone).

What sidecars trust among each other they are told, and confirm. What they trust the control plane by is a
file, and in a cluster nobody knows when the kubelet has brought a new one to a pod; it may take two minutes.
So the old root signs for the new one (a cross-signed certificate, as public authorities do it), and the
control plane shows that along with its own: whoever has the old file, the new one, or both believes it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import ipaddress
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshdemo.control.model import Instance, MeshState
from meshdemo.errors import Failed
from meshdemo.files import write_atomic
from meshdemo.names import parted, qualified

CONTROL_PLANE_NAME = "control-plane.meshdemo"
"""The name in the control plane's certificate; no instance gets a certificate with it."""

_ROOT_LIFETIME = dt.timedelta(days=3650)
_CROSS_LIFETIME = dt.timedelta(hours=1)  # many times what a kubelet takes to renew a file in a pod
_CROSS_AT_MOST = 50  # roots ago; a chain of 100 kB is refused by the other end
_CLOCK_SKEW = dt.timedelta(minutes=1)


def trust_domain(mesh: str) -> str:
    """The SPIFFE trust domain of a mesh, as a URI."""
    return f"spiffe://{mesh}"


def spiffe_id(mesh: str, namespace: str, service: str) -> str:
    """The identity of a service's instances. `namespace`: the mesh's own; `service` may name another."""
    name, its = parted(service, namespace)
    return f"{trust_domain(mesh)}/ns/{its}/sa/{name}"


def service_of(identity: str, home: str) -> str:
    """The service that a SPIFFE id belongs to, as the mesh of the namespace `home` calls it; '' if none."""
    if not identity.startswith("spiffe://"):
        return ""
    path = identity.split("/")
    return qualified(path[-1], path[-3], home) if path[-4:-3] == ["ns"] else path[-1]


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate chain and its private key (PEM), and when to replace it (seconds since the epoch)."""

    chain: bytes
    key: bytes
    renew_at: float
    expires_at: float


@dataclass(frozen=True)
class _Root:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate
    crossed: tuple[x509.Certificate, ...] = ()
    """This root as the one before it vouches for it, that one as its own predecessor does, and so on."""

    @cached_property
    def leaf(self) -> x509.CertificateBuilder:
        """What all certificates have in common that it signs. A thousand sidecars come back at once."""
        return (
            x509.CertificateBuilder()
            # An empty subject: the name is in the SAN, which is critical for that (RFC 5280, 4.1.2.6).
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(_authority_key_id(self.certificate), critical=False)
        )

    def pem(self) -> bytes:
        """Key and certificates in one file, so that they cannot come apart."""
        return _key_pem(self.key) + _pem(self.certificate, *self.crossed)


class Authority:
    """The certificate authority of one mesh."""

    def __init__(self, folder: Path, mesh: str, now: float) -> None:
        """Load the root from `folder`, or make one.

        Files: `ca.pem` (key and certificate that sign), `ca-next.pem` (while the root is being replaced),
        `trust.pem` (the certificates that are trusted; no secret).

        Raises:
            Failed: a stored root cannot be read, or a new one not stored.
        """
        self._mesh = mesh
        self._signing_path = folder / "ca.pem"
        self._next_path = folder / "ca-next.pem"
        self.trust_path = folder / "trust.pem"
        self._next = _load(self._next_path)
        root = _load(self._signing_path)
        if root is None:
            root = _new_root(mesh, now)
            _store(self._signing_path, root.pem())
            self._trusted = [root.certificate]
        else:
            self._trusted = _load_trust(self.trust_path) or [root.certificate]
        self._root = root
        self._write_trust()

    @property
    def trust(self) -> bytes:
        """The certificates (PEM) that instances trust."""
        return _pem(*self._trusted)

    @property
    def replacing_root(self) -> bool:
        """Is a replacement of the root under way, or was it left half-way?"""
        return self._next is not None or len(self._trusted) > 1

    # -- certificates -------------------------------------------------------------------------------------

    def issue(self, identity: str, now: float, lifetime_s: float) -> Certificate:
        """A fresh key and a certificate for a SPIFFE identity, for both ends of mutual TLS."""
        return self._issue([x509.UniformResourceIdentifier(identity)], now, lifetime_s)

    def issue_control_plane(self, now: float, lifetime_s: float) -> Certificate:
        """A fresh key and a certificate for the control plane's own server.

        Its chain leads to the root, and for a while to the roots before it (see above).
        """
        names: list[x509.GeneralName] = [
            x509.DNSName(CONTROL_PLANE_NAME),
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")),
        ]
        return self._issue(names, now, lifetime_s, _living(self._root.crossed, now))

    def _issue(
        self,
        names: list[x509.GeneralName],
        now: float,
        lifetime_s: float,
        others: Sequence[x509.Certificate] = (),
    ) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        start = _utc(now)
        certificate = (
            self._root.leaf.public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - _CLOCK_SKEW)
            .not_valid_after(start + dt.timedelta(seconds=lifetime_s))
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .sign(self._root.key, hashes.SHA256())
        )
        # Spread, so that sidecars that connected together do not all renew at once.
        renew_after_s = lifetime_s * random.uniform(0.6, 0.7)  # noqa: S311 (not a secret)
        return Certificate(
            chain=_pem(certificate, *others),
            key=_key_pem(key),
            renew_at=now + renew_after_s,
            expires_at=now + lifetime_s,
        )

    # -- replacing the root -------------------------------------------------------------------------------

    def prepare_root(self, now: float) -> None:
        """Make the next root and trust it as well. Goes on with a replacement that was left half-way."""
        if self._next is None and not self.replacing_root:
            root = _new_root(self._mesh, now)
            crossed = (_vouched_for(root, self._root, now), *_living(self._root.crossed, now))
            self._next = replace(root, crossed=crossed[:_CROSS_AT_MOST])
            _store(self._next_path, self._next.pem())
        if self._next is not None and self._next.certificate not in self._trusted:
            self._trusted = [*self._trusted, self._next.certificate]
            self._write_trust()

    def switch_root(self) -> None:
        """Sign with the next root from now on. Call when everyone trusts it."""
        if self._next is None:
            return
        _store(self._signing_path, self._next.pem())
        self._next_path.unlink(missing_ok=True)
        self._root, self._next = self._next, None

    def retire_root(self) -> None:
        """Trust the signing root alone. Call when everyone has a certificate of it."""
        self._trusted = [self._root.certificate]
        self._write_trust()

    def _write_trust(self) -> None:
        _store(self.trust_path, self.trust, mode=0o644)


# -- tokens -----------------------------------------------------------------------------------------------


class Authenticator(Protocol):
    """Tells whose bearer token this is. On Kubernetes a TokenReview can stand here."""

    async def instance(self, token: str, mesh: MeshState) -> Instance | None:
        """The instance that the token proves, None if none."""
        ...


class TokenHashes:
    """Tokens that the runtime made, known by their SHA-256 alone (`Instance.token_sha256`)."""

    def __init__(self) -> None:
        self._mesh: MeshState | None = None
        self._by_hash: Mapping[str, Instance] = {}

    async def instance(self, token: str, mesh: MeshState) -> Instance | None:
        """The instance whose token this is."""
        if mesh is not self._mesh:
            self._by_hash = {i.token_sha256: i for i in mesh.sidecars if i.token_sha256}
            self._mesh = mesh
        digest = hashlib.sha256(token.encode()).hexdigest()
        found = self._by_hash.get(digest)
        # The look-up goes by a hash that no one can steer; the comparison proper takes constant time.
        return found if found and hmac.compare_digest(found.token_sha256, digest) else None


def bearer(metadata: Collection[tuple[str, str | bytes]]) -> str:
    """The token in a call's `authorization`, with or without `Bearer`; empty if there is none."""
    for key, value in metadata:
        if key == "authorization":
            text = value.decode(errors="replace") if isinstance(value, bytes) else value
            scheme, _, rest = text.partition(" ")
            return rest.strip() if scheme.lower() == "bearer" else text.strip()
    return ""


# -- helpers ----------------------------------------------------------------------------------------------


def _new_root(mesh: str, now: float) -> _Root:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "meshdemo"),
            # The serial tells roots of one mesh apart: two with one name confuse whoever builds a chain.
            x509.NameAttribute(NameOID.COMMON_NAME, f"{mesh[:40]} root"),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{x509.random_serial_number():x}"[:16]),
        ]
    )
    start = _utc(now)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _CLOCK_SKEW)
        .not_valid_after(start + _ROOT_LIFETIME)
        # No bound of the path: this root vouches for the next one, and that for the one after it.
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(trust_domain(mesh))]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _Root(key, certificate)


def _vouched_for(new: _Root, old: _Root, now: float) -> x509.Certificate:
    """The new root's name, key and extensions under the old root's signature."""
    start = _utc(now)
    builder = (
        x509.CertificateBuilder()
        .subject_name(new.certificate.subject)
        .issuer_name(old.certificate.subject)
        .public_key(new.key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - _CLOCK_SKEW)
        .not_valid_after(start + _CROSS_LIFETIME)
        .add_extension(_authority_key_id(old.certificate), critical=False)
    )
    for extension in new.certificate.extensions:
        builder = builder.add_extension(extension.value, critical=extension.critical)
    return builder.sign(old.key, hashes.SHA256())


def _living(certificates: Sequence[x509.Certificate], now: float) -> tuple[x509.Certificate, ...]:
    return tuple(one for one in certificates if one.not_valid_after_utc > _utc(now))


def _load(path: Path) -> _Root | None:
    try:
        content = path.read_bytes()
        key = serialization.load_pem_private_key(content, password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an EC key")
        certificate, *crossed = x509.load_pem_x509_certificates(content)
        return _Root(key, certificate, tuple(crossed))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Failed(
            f"cannot read the mesh's root certificate from {path}: {error}",
            "take the mesh down and up again: a new root is made then",
        ) from error


def _load_trust(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise Failed(
            f"cannot read the certificates that the mesh trusts from {path}: {error}",
            "remove the file: the root in use is trusted then",
        ) from error


def _store(path: Path, content: bytes, mode: int = 0o600) -> None:
    try:
        write_atomic(path, content, mode=mode, durable=True)
    except OSError as error:
        raise Failed(f"cannot write {path}: {error.strerror}", "make room or mend the permissions") from error


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _utc(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_id(root: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    subject = root.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(subject)
