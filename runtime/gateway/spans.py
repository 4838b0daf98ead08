"""Requests as OpenTelemetry spans: one span for each request, with a child for each stage that executed it.

The parent of a request's span is taken from the client's headers (W3C trace context, or what ``OTEL_PROPAGATORS``
names). OpenTelemetry's own variables say where spans are sent (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME``
and others).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from onnxsplit.errors import InputError
from runtime.gateway.batcher import Inference
from runtime.gateway.errors import client_message

if TYPE_CHECKING:
    from runtime.gateway.models.version import Version


class Spans:
    """Makes a span of every request.

    Args:
        provider: An OpenTelemetry ``TracerProvider``.
    """

    def __init__(self, provider: Any) -> None:
        from opentelemetry import propagate, trace

        import onnxsplit

        self._trace = trace
        self._propagate = propagate
        self._provider = provider
        self._tracer = provider.get_tracer("onnxsplit", onnxsplit.__version__)
        self._epoch_ns = time.time_ns() - time.monotonic_ns()

    @classmethod
    def exporting(cls) -> Spans:
        """Spans that are sent by OTLP over HTTP, to where OpenTelemetry's variables say.

        Raises:
            InputError: The extra ``otel`` is not installed.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise InputError("traces need OpenTelemetry: pip install 'onnxsplit[otel]'") from error
        provider = TracerProvider(resource=Resource({SERVICE_NAME: "onnxsplit"}).merge(Resource.create()))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def answered(
        self,
        version: Version,
        request: str,
        headers: Mapping[str, str],
        arrived_ns: int,
        inference: Inference,
        ended_ns: int,
    ) -> None:
        """Make the spans of a request that was answered."""
        span = self._begin(version, headers, arrived_ns)
        if request:
            span.set_attribute("onnxsplit.request_id", request)
        span.set_attribute("onnxsplit.queue_ns", max(0, inference.entered_ns - arrived_ns))
        span.set_attribute("onnxsplit.rows", inference.checked.rows)
        inside = self._trace.set_span_in_context(span)
        for visit in inference.visits:
            stage = self._tracer.start_span(
                f"stage {visit.stage}",
                context=inside,
                start_time=self._epoch_ns + visit.arrived_ns,
                attributes={
                    "onnxsplit.stage": visit.stage,
                    "onnxsplit.replica": visit.replica,
                    "onnxsplit.wait_ns": visit.started_ns - visit.arrived_ns,
                    "onnxsplit.run_ns": visit.ended_ns - visit.started_ns,
                    "onnxsplit.output_bytes": visit.output_bytes,
                },
            )
            stage.end(self._epoch_ns + visit.sent_ns)
        span.end(self._epoch_ns + ended_ns)

    def failed(
        self, version: Version, headers: Mapping[str, str], arrived_ns: int, ended_ns: int, error: BaseException
    ) -> None:
        """Make the span of a request that failed."""
        span = self._begin(version, headers, arrived_ns)
        span.set_status(
            self._trace.Status(self._trace.StatusCode.ERROR, f"{type(error).__name__}: {client_message(error)}")
        )
        span.set_attribute("error.type", type(error).__name__)
        span.end(self._epoch_ns + ended_ns)

    def _begin(self, version: Version, headers: Mapping[str, str], arrived_ns: int) -> Any:
        return self._tracer.start_span(
            f"infer {version.model}",
            context=self._propagate.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            start_time=self._epoch_ns + arrived_ns,
            attributes={"onnxsplit.model": version.model, "onnxsplit.version": version.number},
        )

    def close(self) -> None:
        """Send the spans that are not sent yet."""
        self._provider.shutdown()
