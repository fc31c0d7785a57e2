"""The mesh's authority and its tokens."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from xds_harness import pair

from meshdemo.control.identity import Authority, TokenHashes, bearer, spiffe_id
from meshdemo.control.model import Instance, MeshState
from meshdemo.errors import Failed

NOW = time.time()
ID = spiffe_id("m", "default", "service-a")


def roots(authority: Authority) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(authority.trust)


def issued(authority: Authority, identity: str = ID, lifetime_s: float = 60) -> x509.Certificate:
    return x509.load_pem_x509_certificate(authority.issue(identity, NOW, lifetime_s).chain)


def test_a_certificate_says_who_and_for_how_long(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "m", NOW)
    made = authority.issue(ID, NOW, 3600)
    certificate = x509.load_pem_x509_certificate(made.chain)
    (root,) = roots(authority)
    certificate.verify_directly_issued_by(root)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert [name.value for name in names.value] == ["spiffe://m/ns/default/sa/service-a"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert certificate.not_valid_after_utc.timestamp() == pytest.approx(NOW + 3600, abs=1)
    assert certificate.not_valid_before_utc.timestamp() < NOW
    assert NOW + 3600 * 0.6 <= made.renew_at <= NOW + 3600 * 0.7
    assert made.expires_at == NOW + 3600
    assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length is None


def test_every_certificate_has_a_key_of_its_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "m", NOW)
    assert issued(authority).public_key() != issued(authority).public_key()


def test_the_root_survives_and_its_key_is_its_owners_alone(tmp_path: Path) -> None:
    first = Authority(tmp_path, "m", NOW)
    again = Authority(tmp_path, "m", NOW)
    assert again.trust == first.trust
    issued(again).verify_directly_issued_by(roots(first)[0])
    assert (tmp_path / "ca.pem").stat().st_mode & 0o777 == 0o600
    assert b"PRIVATE" not in (tmp_path / "trust.pem").read_bytes()


@pytest.mark.parametrize("name", ["ca.pem", "trust.pem"])
def test_a_damaged_root_is_said_to_be_one(tmp_path: Path, name: str) -> None:
    Authority(tmp_path, "m", NOW)
    (tmp_path / name).write_bytes(b"garbage")
    with pytest.raises(Failed, match=f"cannot read .*{name}"):
        Authority(tmp_path, "m", NOW)


def test_the_root_is_replaced_with_an_overlap_also_across_a_restart_at_any_step(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "m", NOW)
    (old,) = roots(authority)
    authority.prepare_root(NOW)
    assert len(roots(authority)) == 2
    issued(authority).verify_directly_issued_by(old)

    authority = Authority(tmp_path, "m", NOW)  # restarted half-way
    assert authority.replacing_root
    assert len(roots(authority)) == 2
    authority.prepare_root(NOW)
    assert len(roots(authority)) == 2
    authority.switch_root()
    new = next(root for root in roots(authority) if root != old)
    issued(authority).verify_directly_issued_by(new)
    assert old in roots(authority)

    authority = Authority(tmp_path, "m", NOW)  # and again
    assert authority.replacing_root
    assert old in roots(authority)
    issued(authority).verify_directly_issued_by(new)
    authority.prepare_root(NOW)
    authority.switch_root()
    authority.retire_root()
    assert roots(authority) == [new]
    assert not authority.replacing_root
    assert roots(Authority(tmp_path, "m", NOW)) == [new]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.pem", "trust.pem"]


def test_a_token_proves_its_instance_and_nothing_else_does() -> None:
    ports = {"inbound_port": 1, "outbound_port": 2, "metrics_port": 3, "app_port": 4}
    with_token = Instance(
        id="a", service="service-a", version="v1", token_sha256=hashlib.sha256(b"secret").hexdigest(), **ports
    )
    without = Instance(id="b", service="service-b", version="v1", **ports)
    mesh = MeshState(mesh="m", app=pair(), instances=(with_token, without))
    tokens = TokenHashes()

    def of(token: str, mesh: MeshState = mesh) -> Instance | None:
        return asyncio.run(tokens.instance(token, mesh))

    assert of("secret") == with_token
    for wrong in ("", "Secret", "secret ", with_token.token_sha256, "ü"):
        assert of(wrong) is None
    assert of("secret", mesh.model_copy(update={"instances": (without,)})) is None


@pytest.mark.parametrize(
    ("value", "token"),
    [
        ("Bearer x", "x"), ("bearer x ", "x"), ("x", "x"), (b"Bearer x", "x"), ("", ""), ("Bearer ", ""),
        ("Basic x", "Basic x"),
    ],
)  # fmt: skip
def test_the_token_of_a_call(value: str | bytes, token: str) -> None:
    assert bearer([("x", "y"), ("authorization", value)]) == token
    assert bearer([]) == ""
