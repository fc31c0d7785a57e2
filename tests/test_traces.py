"""Spans of the sidecars, to a collector that somebody names; to nobody otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from local_harness import Cli, wait_for
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from page_harness import made_up

from meshdemo.control import xds
from meshdemo.control.intent import set_traces, trace_endpoint
from meshdemo.control.model import Intent
from meshdemo.control.render.renderer import Renderer
from meshdemo.errors import BadInput


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("http://127.0.0.1:4317", "127.0.0.1:4317"),
        ("collector:4317", "collector:4317"),
        ("grpc://otel.observe.svc:4317/", "otel.observe.svc:4317"),
        ("http://[::1]:4317", "[::1]:4317"),
    ],
)
def test_an_endpoint_is_given_as_people_do(text: str, endpoint: str) -> None:
    assert trace_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "http://", "collector", "https://c:4317", "http://c:4317/v1/traces", "c:port", "c:0", None, 3],
)
def test_an_endpoint_that_makes_no_sense_is_refused(text: object) -> None:
    with pytest.raises(BadInput, match="OTLP endpoint"):
        trace_endpoint(text)


def test_nothing_of_it_is_there_unless_asked_for() -> None:
    on = set_traces(Intent(), "http://127.0.0.1:4317")
    assert on.revision == 2
    off = set_traces(on, None)
    plain, traced, again = (
        Renderer().snapshots(made_up(2, 2), intent)["service-a-v1-0"] for intent in (Intent(), on, off)
    )
    assert [bundle.version for bundle in plain[xds.CLUSTERS]] == [b.version for b in again[xds.CLUSTERS]]
    assert [bundle.version for bundle in plain[xds.LISTENERS]] == [b.version for b in again[xds.LISTENERS]]
    assert [bundle.version for bundle in plain[xds.CLUSTERS]] != [b.version for b in traced[xds.CLUSTERS]]
    assert [bundle.version for bundle in plain[xds.LISTENERS]] != [b.version for b in traced[xds.LISTENERS]]


class Collector:
    """Takes spans in, as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        self.spans: dict[bytes, set[str]] = {}  # trace -> services that were part of it
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(4))
        handler = grpc.unary_unary_rpc_method_handler(self._export)
        name = "opentelemetry.proto.collector.trace.v1.TraceService"
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {"Export": handler}),)
        )
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def _export(self, raw: bytes, _: grpc.ServicerContext) -> bytes:
        message = trace_service_pb2.ExportTraceServiceRequest.FromString(raw)
        for resource in message.resource_spans:
            names = [a.value.string_value for a in resource.resource.attributes if a.key == "service.name"]
            scopes = getattr(resource, "scope_spans", None) or resource.instrumentation_library_spans
            with self._lock:
                for scope in scopes:
                    for span in scope.spans:
                        self.spans.setdefault(span.trace_id, set()).update(names)
        return b""

    def whole(self) -> int:
        """How many traces have the spans of caller and called."""
        with self._lock:
            return sum(services == {"service-a", "service-b"} for services in self.spans.values())

    def stop(self) -> None:
        """Stop serving."""
        self._server.stop(None)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


def test_a_request_is_one_trace_through_both_sidecars(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> None:
    url = f"http://127.0.0.1:{collector.port}"
    with Cli(tmp_path_factory.mktemp("home")).up(
        "--runtime", "local", "--rps", "30", "--otlp-endpoint", url
    ) as mesh:
        wait_for("traces through both sidecars", lambda: collector.whole() > 20)

        def switch_off(attempt: int) -> None:
            if attempt:
                mesh.run("up", "--otlp-endpoint", url)
            mesh.run("up", "--otlp-endpoint", "off")

        mesh.loses_no_request(switch_off)
        seen = len(collector.spans)
        enough = mesh.counts()["200"] + 60  # two seconds of requests, in which nothing more is told
        wait_for("requests after the switch", lambda: mesh.counts()["200"] >= enough)
        assert len(collector.spans) - seen < 60


def test_bad_input_starts_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    cli = Cli(tmp_path_factory.mktemp("home"))
    assert "OTLP endpoint" in cli.run("up", "--runtime", "local", "--otlp-endpoint", "https://x:1", status=2)
    assert cli.leftovers() == []
