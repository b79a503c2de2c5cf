"""Traces by OpenTelemetry, an extra: a span for each request and what it was made of, told when the request has ended.

POST /v1/completions      child of the client's span, by its traceparent
  route                   of each prompt
  first piece             from the engine's call to the first piece: waiting and prefill, which nobody tells apart
  rest                    from there to the last: decoding
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from routers.errors import ModelGlueError
from service.access import OPEN
from service.record import Record, Tell

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


class TracingError(ModelGlueError):
    """Traces cannot be sent."""


def tracer(exporter: SpanExporter | None = None) -> tuple[Tell, Any]:
    """What traces a request, and what to call at the end (`shutdown`).

    The spans go by OTLP over HTTP to where OTEL_EXPORTER_OTLP_ENDPOINT says. Raises TracingError without the packages.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if exporter is None:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ImportError as exc:
        raise TracingError("--trace needs OpenTelemetry: pip install 'modelglue[tracing]'") from exc
    about = Resource.create({"service.name": "modelglue", "service.version": version("modelglue")})
    provider = TracerProvider(resource=about)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    own = provider.get_tracer("modelglue")
    return lambda record: _trace(own, record), provider


def _trace(own: Any, record: Record) -> None:
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if record.path in OPEN:
        return
    carrier = {"traceparent": record.traceparent} if record.traceparent else {}
    parent = TraceContextTextMapPropagator().extract(carrier)
    span = own.start_span(
        f"{record.method} {record.endpoint}".strip(),
        parent,
        SpanKind.SERVER,
        attributes=_attributes(record),
        start_time=_clock(record, record.began),
    )
    if record.status >= 500:
        span.set_status(Status(StatusCode.ERROR, record.code or ""))
    inside = set_span_in_context(span, parent)

    def child(name: str, start: float, end: float, **attributes: Any) -> None:
        made = own.start_span(name, inside, attributes=attributes, start_time=_clock(record, start))
        made.end(_clock(record, end))

    for part in record.parts:
        decision = part.decision
        child(
            "route",
            decision.at,
            decision.at + decision.seconds,
            **{"modelglue.expert": decision.route.expert, "modelglue.reason": decision.route.reason},
        )
        for answer in part.answers:
            if answer.first_at is not None:
                child("first piece", answer.began, answer.first_at)
                child(
                    "rest",
                    answer.first_at,
                    answer.last_at or answer.first_at,
                    **{"gen_ai.usage.output_tokens": answer.tokens},
                )
    span.end(_clock(record, record.ended or record.began))


def _attributes(record: Record) -> dict[str, Any]:
    told: dict[str, Any] = {
        "http.request.method": record.method,
        "http.route": record.endpoint,
        "http.response.status_code": record.status,
        "modelglue.request_id": record.id,
    }
    if record.key:
        told["modelglue.key"] = record.key
    if record.code:
        told["error.type"] = record.code
    if record.completion:
        told["gen_ai.usage.input_tokens"] = record.completion.usage.prompt
        told["gen_ai.usage.output_tokens"] = record.completion.tokens
    return told


def _clock(record: Record, moment: float) -> int:
    """Nanoseconds since 1970 of a moment by time.perf_counter."""
    return int((record.at + moment - record.began) * 1e9)
