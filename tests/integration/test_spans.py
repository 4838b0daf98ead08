"""Spans that OpenTelemetry's own exporter sends to a test collector."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service
from served import Served

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector():
    spans: list[object] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            import gzip

            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            sent = trace_service.ExportTraceServiceRequest.FromString(body)
            for resource in sent.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", spans
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_is_a_span_and_each_stage_a_child_of_it(chain_plan, python_environment, collector):
    address, spans = collector
    environment = {**python_environment, "OTEL_EXPORTER_OTLP_ENDPOINT": address}
    tensor = {"name": "x", "shape": [1, 32], "datatype": "FP32", "data": [0.5] * 32}
    body = json.dumps({"id": "seven", "inputs": [tensor]}).encode()
    with Served(chain_plan, "--otel", environment=environment) as server:
        status, _, _ = server.ask("/v2/models/model/infer", body, Traceparent=f"00-{TRACE}-{PARENT}-01")
        assert status == 200
        assert server.ask("/v2/models/model/infer", b'{"inputs": []}')[0] == 400
    whole = next(span for span in spans if span.name == "infer model" and span.trace_id.hex() == TRACE)
    stages = [span for span in spans if span.parent_span_id == whole.span_id]
    assert whole.parent_span_id.hex() == PARENT
    assert sorted(span.name for span in stages) == ["stage 0", "stage 1"]
    said = {item.key: item.value.string_value for item in whole.attributes}
    assert said["onnxsplit.request_id"] == "seven"
    for span in stages:
        assert whole.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= whole.end_time_unix_nano
    failed = next(span for span in spans if span.trace_id.hex() != TRACE)
    assert "InputError" in failed.status.message
