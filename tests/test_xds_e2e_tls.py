"""Who may talk to whom: mutual TLS between real sidecars, access rules, rotation of certificates and root."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from xds_harness import Load, Member, Mesh, mesh_of, pair, until

from meshdemo.control.identity import Authority, Certificate, spiffe_id
from meshdemo.control.intent import set_access
from meshdemo.control.plane import Settings

WORK = "http://service-b:5000/work"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """service-a, service-b twice, and service-c, which is nobody's caller."""
    with mesh_of(pair(), Settings(root_overlap_s=0.2)) as mesh:
        for service in ("service-a", "service-b", "service-b", "service-c"):
            mesh.add(service)
        mesh.start()
        yield mesh


def knock(member: Member, folder: Path, certificate: Certificate | None, **context: ssl.TLSVersion) -> int:
    """A request straight to an instance's mesh port with this client certificate; its status.

    Raises OSError (ssl.SSLError) where the connection is refused.
    """
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    for name, value in context.items():
        setattr(client, name, value)
    if certificate:
        path = folder / "client.pem"
        path.write_bytes(certificate.key + certificate.chain)
        client.load_cert_chain(path)
    port = member.instance.inbound_port
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=client, timeout=10)
    try:
        connection.request("GET", "/work")
        return connection.getresponse().status
    except http.client.RemoteDisconnected as error:
        raise OSError("hung up") from error
    finally:
        connection.close()


def test_only_certificates_of_this_mesh_open_the_door(mesh: Mesh, tmp_path: Path) -> None:
    b = mesh.members["service-b-1"]
    now = time.time()
    authority = Authority(mesh.state, "m", now)  # the mesh's own root, as read from its folder
    caller = spiffe_id("m", "default", "service-a")
    assert knock(b, tmp_path, authority.issue(caller, now, 60)) == 200
    assert knock(b, tmp_path, authority.issue(spiffe_id("m", "default", "service-c"), now, 60)) == 403
    assert knock(b, tmp_path, authority.issue(spiffe_id("m", "other", "service-a"), now, 60)) == 403
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other", "m", now)
    for refused in (
        None,
        other.issue(caller, now, 60),  # another authority
        authority.issue(caller, now - 120, 60),  # expired
        authority.issue(spiffe_id("m2", "default", "service-a"), now, 60),  # of another mesh
        authority.issue_control_plane(now, 60),  # of the control plane: no instance
    ):
        with pytest.raises(OSError):
            knock(b, tmp_path, refused)
    with pytest.raises(OSError):
        knock(b, tmp_path, authority.issue(caller, now, 60), maximum_version=ssl.TLSVersion.TLSv1_2)
    served = [path for _, path in b.upstream.requests]
    assert served == ["/work"]


def test_plain_text_is_refused_at_the_mesh_port(mesh: Mesh) -> None:
    b = mesh.members["service-b-1"]
    with socket.create_connection(("127.0.0.1", b.instance.inbound_port), timeout=10) as plain:
        plain.sendall(b"GET /work HTTP/1.1\r\nHost: service-b\r\n\r\n")
        try:
            answer = plain.recv(1000)
        except ConnectionResetError:
            answer = b""
    assert b"HTTP" not in answer
    assert b.upstream.requests == []


def test_every_connection_between_sidecars_is_tls_13_with_both_identities(mesh: Mesh) -> None:
    client = mesh.members["service-a-1"].client()
    for _ in range(20):
        assert client.get(WORK).status == 200
    seen = mesh.members["service-b-1"].upstream.headers + mesh.members["service-b-2"].upstream.headers
    for headers in seen:
        assert headers["x-forwarded-client-cert"].startswith("By=spiffe://m/ns/default/sa/service-b;Hash=")
        assert headers["x-forwarded-client-cert"].endswith("URI=spiffe://m/ns/default/sa/service-a")
    # What a caller claims to be is dropped.
    claim = {"x-forwarded-client-cert": "By=x;Hash=y;URI=spiffe://m/ns/default/sa/admin"}
    assert client.get(WORK, headers=claim).status == 200
    all_seen = mesh.members["service-b-1"].upstream.headers + mesh.members["service-b-2"].upstream.headers
    assert not any("sa/admin" in headers["x-forwarded-client-cert"] for headers in all_seen)


def test_access_is_what_the_app_declares_until_somebody_says_otherwise(mesh: Mesh) -> None:
    a, c = mesh.members["service-a-1"].client(), mesh.members["service-c-1"].client()
    assert (a.get(WORK).status, c.get(WORK).status) == (200, 403)

    def set_to(caller: str, allowed: bool) -> int:
        effect = mesh.change(lambda intent, state: set_access(intent, state, caller, "service-b", allowed))
        return int(effect.sidecars)

    assert set_to("service-c", True) == 2  # the sidecars of service-b
    assert (a.get(WORK).status, c.get(WORK).status) == (200, 200)
    set_to("service-a", False)
    assert (a.get(WORK).status, c.get(WORK).status) == (403, 200)
    set_to("service-c", False)
    assert (a.get(WORK).status, c.get(WORK).status) == (403, 403)
    set_to("service-a", True)
    assert (a.get(WORK).status, c.get(WORK).status) == (200, 403)


def served_certificate(member: Member) -> x509.Certificate:
    """The certificate that a sidecar shows at its mesh port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", member.instance.inbound_port), timeout=10) as plain,
        context.wrap_socket(plain) as tls,
    ):
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")


def test_each_instance_has_a_key_of_its_own_and_rotation_under_load_fails_nothing(mesh: Mesh) -> None:
    b1, b2 = mesh.members["service-b-1"], mesh.members["service-b-2"]
    first = [served_certificate(member) for member in (b1, b2)]
    assert first[0].public_key() != first[1].public_key()
    names = first[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://m/ns/default/sa/service-b"]
    lifetime = first[0].not_valid_after_utc - first[0].not_valid_before_utc
    assert 3600 <= lifetime.total_seconds() <= 3700
    seen = {certificate.serial_number for certificate in first}
    assert mesh.control
    with Load(mesh.members["service-a-1"], WORK) as load:
        for _ in range(10):
            assert mesh.control.run(mesh.plane.rotate_certificates()).sidecars == 4
            load.more(30)
            serial = served_certificate(b1).serial_number
            assert serial not in seen
            seen.add(serial)
    assert load.failed == []


def test_certificates_renew_themselves_before_they_expire() -> None:
    with mesh_of(pair(), Settings(certificate_lifetime_s=10.0)) as mesh:
        a = mesh.add("service-a")
        both = (a, mesh.add("service-b"))
        mesh.start()
        first = [served_certificate(one) for one in both]
        ends = max(one.not_valid_after_utc.timestamp() for one in first)
        with Load(a, WORK) as load:
            until(
                lambda: {served_certificate(one).serial_number for one in both}.isdisjoint(
                    one.serial_number for one in first
                ),
                "new certificates",
            )
            until(lambda: time.time() > ends + 0.5, "the first ones to expire")
            # New connections, with certificates that live.
            client = a.client()
            assert client.get(WORK).status == 200
            load.more(30)
        assert load.failed == []
        # The control plane's own certificate too: a sidecar that connects anew believes it.
        assert a.process
        a.process.kill()
        a.process.wait()
        a.admin.unlink(missing_ok=True)
        mesh.start_sidecar(a)
        mesh.await_ready(a)


def test_the_root_can_be_replaced_under_load_and_outlives_a_restart(mesh: Mesh) -> None:
    a, b = mesh.members["service-a-1"], mesh.members["service-b-1"]
    issuer = served_certificate(b).issuer
    old_trust = (mesh.state / "trust.pem").read_bytes()
    assert mesh.control
    with Load(a, WORK) as load:
        mesh.control.run(mesh.plane.rotate_root())
        load.more(50)
        assert served_certificate(b).issuer != issuer
        new_trust = (mesh.state / "trust.pem").read_bytes()
        assert new_trust != old_trust
        assert new_trust.count(b"BEGIN CERTIFICATE") == 1
        mesh.stop_control(abruptly=True)
        mesh.start_control()
        until(
            lambda: all(s.acked for s in mesh.sidecars()),
            "the sidecars to trust the new root and be back",
        )
        load.more(50)
    assert load.failed == []
    assert (mesh.state / "trust.pem").read_bytes() == new_trust
    for name in ("ca.pem", "intent.json"):
        path = mesh.state / name
        if path.exists():
            assert path.stat().st_mode & 0o077 == 0
    assert "BEGIN PRIVATE KEY" in (mesh.state / "ca.pem").read_text()


def test_a_server_of_another_identity_is_no_service_b(tmp_path: Path) -> None:
    """Somebody of the mesh answers at an endpoint of service-b: its callers refuse to speak to them."""
    with mesh_of(pair()) as mesh:
        a, b = mesh.add("service-a"), mesh.add("service-b")
        mesh.start_control()
        mesh.start_sidecar(a)
        mesh.await_ready(a)
        authority = Authority(mesh.state, "m", time.time())
        listening = socket.create_server(("127.0.0.1", b.instance.inbound_port))
        received: list[bytes] = []

        def serve(identity: str) -> ssl.SSLContext:
            certificate = authority.issue(spiffe_id("m", "default", identity), time.time(), 60)
            (tmp_path / "server.pem").write_bytes(certificate.key + certificate.chain)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tmp_path / "server.pem")
            return context

        shown = serve("service-c")

        def accept() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                try:
                    with shown.wrap_socket(connection, server_side=True) as tls:
                        received.append(tls.recv(4096))
                        tls.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nhi")
                except OSError:
                    continue

        threading.Thread(target=accept, daemon=True).start()
        client = a.client()
        answer = client.get(WORK)
        assert (answer.status, any(received)) == (503, False)
        shown = serve("service-b")  # with the right name it would have been believed
        until(
            lambda: client.get(WORK).body == "hi", "the same server under the right identity to be spoken to"
        )
        listening.close()
