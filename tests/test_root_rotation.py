"""The root replaced where sidecars learn late what to check the control plane by: in a cluster.

The control plane is real, and so are the Envoys. What is played is the kubelet, which brings a changed ConfigMap
to a pod when it sees fit, in the way that it changes a volume; and an API server that keeps the objects.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from kube_mock import ApiServer, Refusal, Stored
from test_xds_e2e_tls import WORK, knock, served_certificate
from xds_harness import Load, Member, Mesh, pair, until

from meshdemo.control.bootstrap import Placement, bootstrap_files
from meshdemo.control.identity import CONTROL_PLANE_NAME, Authority, spiffe_id
from meshdemo.control.kubernetes.kept import AuthorityKeeper
from meshdemo.control.plane import Settings
from meshdemo.errors import Failed

NOW = time.time()


# -- the control plane's certificate -----------------------------------------------------------------------


def believed(chain: bytes, *roots: x509.Certificate, at: float = NOW) -> bool:
    """Does somebody who trusts these roots, and nothing else, believe that this is the control plane?"""
    leaf, *others = x509.load_pem_x509_certificates(chain)
    policy = PolicyBuilder().store(Store(roots)).time(dt.datetime.fromtimestamp(at, dt.UTC))
    try:
        policy.build_server_verifier(x509.DNSName(CONTROL_PLANE_NAME)).verify(leaf, others)
    except VerificationError:
        return False
    return True


def trusted(authority: Authority) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(authority.trust)


def test_the_control_plane_is_believed_by_whoever_trusts_the_old_root_the_new_one_or_both(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path, "m", NOW)
    (first,) = trusted(authority)
    authority.prepare_root(NOW)
    before, both = authority.issue_control_plane(NOW, 60).chain, trusted(authority)
    authority.switch_root()
    during = authority.issue_control_plane(NOW, 60).chain
    authority.retire_root()
    (second,) = trusted(authority)
    after = authority.issue_control_plane(NOW, 60).chain
    assert [believed(before, *roots) for roots in ([first], both)] == [True, True]
    for chain in (during, after):
        assert [believed(chain, *roots) for roots in ([first], both, [second])] == [True, True, True]
    # So it stays over a restart, and over the next replacement for who missed both.
    authority = Authority(tmp_path, "m", NOW)
    authority.prepare_root(NOW)
    authority.switch_root()
    chain = authority.issue_control_plane(NOW, 60).chain
    assert [believed(chain, root) for root in (first, second, authority_root(authority))] == [True] * 3
    # Nobody else is vouched for: neither another authority, nor what an instance would say it is.
    (tmp_path / "other").mkdir()
    assert not believed(Authority(tmp_path / "other", "m", NOW).issue_control_plane(NOW, 60).chain, first)
    assert not believed(authority.issue(spiffe_id("m", "n", "service-a"), NOW, 60).chain, first)
    # In the end old roots count for nothing.
    later = NOW + 2 * 3600
    chain = authority.issue_control_plane(later, 60).chain
    assert chain.count(b"BEGIN CERTIFICATE") == 1
    assert [believed(chain, root, at=later) for root in (first, authority_root(authority))] == [False, True]


def authority_root(authority: Authority) -> x509.Certificate:
    return trusted(authority)[-1]


def test_a_root_that_is_replaced_all_the_time_does_not_make_the_chain_grow_without_end(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path, "m", NOW)
    for _ in range(60):
        authority.prepare_root(NOW)
        authority.switch_root()
        authority.retire_root()
    chain = authority.issue_control_plane(NOW, 60).chain
    assert chain.count(b"BEGIN CERTIFICATE") == 51
    assert len(chain) < 60_000  # 100 kB is where TLS libraries stop reading


# -- in a cluster ------------------------------------------------------------------------------------------


class Volume:
    """A projected volume, written as the kubelet writes it: all files at once, by turning one link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def write(self, files: dict[str, str]) -> None:
        data = Path(tempfile.mkdtemp(prefix="..", dir=self.folder))
        for name, content in files.items():
            (data / name).write_text(content)
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        before = (self.folder / "..data").resolve() if (self.folder / "..data").exists() else None
        (self.folder / "..data_tmp").symlink_to(data.name)
        (self.folder / "..data_tmp").replace(self.folder / "..data")
        if before is not None:
            shutil.rmtree(before)


class Died(BaseException):
    """The control plane's process is gone at this moment."""


class ClusterMesh(Mesh):
    """A mesh whose control plane keeps its authority in a Secret, and whose sidecars mount a ConfigMap."""

    def __init__(self, folder: Path, server: ApiServer) -> None:
        super().__init__(folder, pair(), Settings(root_overlap_s=0.2, ack_timeout_s=4))
        self.secret = Stored(server, "meshdemo-ca", secret=True)
        self.trust = Stored(server, "meshdemo-trust")
        self.server = server
        self.volumes: dict[str, Volume] = {}
        self.stored = 0
        self.dies_at: tuple[int, str] | None = None  # the n-th time that it stores, before or after that

    def start_control(self) -> None:
        """A new pod: its folder is empty, and is filled from the Secret."""
        shutil.rmtree(self.state)
        self.state.mkdir(mode=0o700)
        keeper = AuthorityKeeper(self.server.cluster(patience_s=0), "n", self.state)
        keeper.restore()

        def keep() -> None:
            self.stored += 1
            if self.dies_at == (self.stored, "before"):
                raise Died
            keeper.save()
            if self.dies_at == (self.stored, "after"):
                raise Died

        self.keep_authority = keep
        super().start_control()
        keeper.save()  # as the loop does that carries back what has changed

    def bring(self, name: str) -> None:
        """The kubelet brings what there is now to a pod."""
        member, volume = self.members[name], self.volumes[name]
        placement = Placement(
            folder=volume.folder, trust=volume.folder / "trust.pem", admin=member.admin,
            control_host="127.0.0.1", control_port=self.control_port,
        )  # fmt: skip
        trust = self.trust.object["data"]["trust.pem"]
        files = {**bootstrap_files(member.instance, placement), "token": member.token, "trust.pem": trust}
        volume.write(files)

    def start_sidecar(self, member: Member) -> None:
        name = member.instance.id
        self.volumes[name] = Volume(member.folder / "etc")
        self.bring(name)
        self.run_envoy(member, self.volumes[name].folder / "bootstrap.yaml")

    def all_back(self) -> None:
        until(
            lambda: all(one.acked for one in self.sidecars()) and self.sidecars(),
            "all sidecars to be back",
        )


@pytest.fixture
def server() -> Iterator[ApiServer]:
    server = ApiServer()
    yield server
    server.close()


@pytest.fixture
def mesh(server: ApiServer) -> Iterator[ClusterMesh]:
    folder = Path(tempfile.mkdtemp(prefix="mx"))
    mesh = ClusterMesh(folder, server)
    try:
        for service in ("service-a", "service-b", "service-b"):
            mesh.add(service)
        mesh.start()
        yield mesh
    finally:
        mesh.stop()
        shutil.rmtree(folder, ignore_errors=True)


def root_of(mesh: ClusterMesh) -> bytes | None:
    """The root that pods started now will trust; None while there are two."""
    trust = mesh.trust.object["data"]["trust.pem"]
    roots = [one.subject.public_bytes() for one in x509.load_pem_x509_certificates(trust.encode())]
    return roots[0] if len(roots) == 1 else None


def test_the_root_is_replaced_although_pods_learn_late_and_the_control_plane_dies_at_any_moment(
    mesh: ClusterMesh, tmp_path: Path
) -> None:
    a, b = mesh.members["service-a-1"], mesh.members["service-b-1"]
    first, caller = root_of(mesh), spiffe_id("m", "default", "service-a")
    old = Authority(shutil.copytree(mesh.state, tmp_path / "first"), "m", time.time())
    roots = {first}
    with Load(a, WORK) as load:
        for moment in (None, (1, "before"), (1, "after"), (2, "before"), (2, "after"), (3, "before")):
            mesh.stored, mesh.dies_at = 0, moment
            assert mesh.control
            if moment is None:
                assert mesh.control.run(mesh.plane.rotate_root()).sidecars == 3
            else:
                with pytest.raises(Died):
                    mesh.control.run(mesh.plane.rotate_root())
            load.more(20)
            mesh.stop_control(abruptly=True)
            mesh.dies_at = None
            mesh.start_control()
            # No pod has been brought anything since the first root: they believe the control plane all the same.
            mesh.all_back()
            if moment not in {None, (1, "before")}:  # then nothing is left half-way
                until(lambda: mesh.journal("rotated"), "the replacement to be finished")
                assert root_of(mesh) not in {None, *roots}
            assert not mesh.plane.replacing_root
            roots.add(root_of(mesh))
            load.more(20)
            assert load.failed == [], moment
        assert len(roots) == 6
        # A pod that starts now has the new root alone; one that was told late, or never, is as good.
        late = mesh.add("service-b", ready=False)
        mesh.refresh()
        mesh.start_sidecar(late)
        mesh.await_ready(late)
        mesh.update(late.instance.id, ready=True)  # not before: as a pod, it gets no requests until it is
        assert load.failed == [], "the pod that started late"
        mesh.bring("service-b-1")
        mesh.stop_control(abruptly=True)
        mesh.start_control()
        mesh.all_back()
        load.more(20)
        until(lambda: late.upstream.requests, "a request at the pod that started late")
    assert load.failed == []
    for member in (b, late):
        assert served_certificate(member).issuer.public_bytes() == root_of(mesh)
    # Who still has the first root's key is nobody in this mesh now.
    with pytest.raises(OSError):
        knock(b, tmp_path, old.issue(caller, time.time(), 60))
    now = Authority(mesh.state, "m", time.time())
    assert knock(b, tmp_path, now.issue(caller, time.time(), 60)) == 200
    assert set(mesh.secret.object["data"]) == {"ca.pem.gz", "trust.pem.gz"}


def test_a_replacement_that_cannot_be_stored_is_refused_and_goes_on_later(
    mesh: ClusterMesh, server: ApiServer
) -> None:
    assert mesh.control
    client, first = mesh.members["service-a-1"].client(), root_of(mesh)
    mesh.secret.refusal = Refusal(403, "Forbidden", "secrets is forbidden")
    with pytest.raises(Failed, match="forbidden"):
        mesh.control.run(mesh.plane.rotate_root())
    # What is not stored is not used: neither do sidecars hear of the new root, nor do pods.
    assert root_of(mesh) == first
    assert served_certificate(mesh.members["service-b-1"]).issuer.public_bytes() == first
    assert client.get(WORK).status == 200
    mesh.secret.refusal = None
    assert mesh.control.run(mesh.plane.rotate_root()).sidecars == 3
    assert root_of(mesh) != first
    assert client.get(WORK).status == 200


def test_the_root_stays_while_a_sidecar_that_serves_cannot_hear_of_the_new_one(mesh: ClusterMesh) -> None:
    """Cut off from the control plane it would go on with what it has, and trust nobody any more."""
    assert mesh.control
    a, b = mesh.members["service-a-1"], mesh.members["service-b-1"]
    first = served_certificate(b).issuer
    assert b.process
    b.process.kill()
    b.process.wait()
    until(lambda: not all(one.connected for one in mesh.sidecars()), "it to be seen gone")
    with pytest.raises(Failed, match=r"no answer from service-b-1 \(of 1\) to trusting the new root"):
        mesh.control.run(mesh.plane.rotate_root())
    assert mesh.plane.replacing_root
    assert served_certificate(mesh.members["service-b-2"]).issuer == first
    mesh.update("service-b-1", ready=False)  # it gets no requests, so nobody waits for it
    assert mesh.control.run(mesh.plane.rotate_root()).sidecars == 2
    assert not mesh.plane.replacing_root
    assert a.client().get(WORK).status == 200


def test_a_token_that_the_kubelet_renews_is_used(mesh: ClusterMesh) -> None:
    member = mesh.members["service-a-1"]
    member.token = "renewed"  # noqa: S105
    mesh.bring("service-a-1")
    mesh.update("service-a-1", token_sha256=hashlib.sha256(b"renewed").hexdigest())
    mesh.stop_control(abruptly=True)
    mesh.start_control()
    mesh.all_back()
