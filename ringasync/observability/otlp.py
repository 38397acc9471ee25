"""Lives of rollouts as OpenTelemetry spans, over OTLP/HTTP. Imported only where traces are on."""

from __future__ import annotations

from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

from ringasync import __version__
from ringasync.observability.lives import LifeSpan, span_id

SEND_TIMEOUT_S = 5.0
SPANS_A_REQUEST = 512
_NS_PER_MS = 1_000_000


class LifeSender:
    """Makes spans of lives and sends them; every role is a service, every session an instance.

    Headers, compression and certificates are the exporter's own: ``OTEL_EXPORTER_OTLP_*``.
    """

    def __init__(self, url: str, run: str) -> None:
        self._run = run
        self._ids = _GivenIds()
        self._made: list[ReadableSpan] = []
        self._providers: dict[tuple[str, str], TracerProvider] = {}
        self._exporter = OTLPSpanExporter(endpoint=url, timeout=SEND_TIMEOUT_S)

    def send(self, lives: Sequence[tuple[int, Sequence[LifeSpan]]]) -> int:
        """Send lives, each with its trace id; how many spans did not arrive. Blocking.

        After a request that failed the rest is not tried: it would wait as long again.
        """
        for trace_number, spans in lives:
            self._make(trace_number, spans)
        made = [*self._made]
        self._made.clear()
        self._providers.clear()  # sessions come and go: none is kept
        for first in range(0, len(made), SPANS_A_REQUEST):
            part = made[first : first + SPANS_A_REQUEST]
            if self._exporter.export(part) is not SpanExportResult.SUCCESS:
                return len(made) - first
        return 0

    def close(self) -> None:
        """Give up what is being sent; from any thread."""
        self._exporter.shutdown()

    def _make(self, trace_number: int, spans: Sequence[LifeSpan]) -> None:
        root = trace.SpanContext(
            trace_number, span_id(trace_number, 0), is_remote=True, trace_flags=_SAMPLED
        )
        under_root = trace.set_span_in_context(trace.NonRecordingSpan(root))
        for position, part in enumerate(spans):
            self._ids.trace, self._ids.span = trace_number, span_id(trace_number, position)
            span = self._tracer(part).start_span(
                part.name,
                context=under_root if position else _NO_PARENT,
                attributes={f"ringasync.{name}": value for name, value in part.attributes.items()},
                start_time=part.begin_ms * _NS_PER_MS,
            )
            if part.error:
                span.set_status(trace.StatusCode.ERROR, part.error)
            span.end(part.end_ms * _NS_PER_MS)

    def _tracer(self, part: LifeSpan) -> trace.Tracer:
        key = (part.role, part.who)
        if key not in self._providers:
            named = {"service.name": f"ringasync-{part.role}", "service.namespace": self._run}
            if part.who:
                named["service.instance.id"] = part.who
            provider = TracerProvider(
                sampler=ALWAYS_ON,
                resource=Resource.create({**named, "service.version": __version__}),
                id_generator=self._ids,
                shutdown_on_exit=False,
            )
            provider.add_span_processor(_Collector(self._made))
            self._providers[key] = provider
        return self._providers[key].get_tracer("ringasync", __version__)


_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)
_NO_PARENT = trace.set_span_in_context(trace.INVALID_SPAN)


class _GivenIds(IdGenerator):  # type: ignore[misc]
    """The ids that were worked out, one span at a time."""

    trace = span = 0

    def generate_trace_id(self) -> int:
        return self.trace

    def generate_span_id(self) -> int:
        return self.span


class _Collector(SpanProcessor):  # type: ignore[misc]
    def __init__(self, made: list[ReadableSpan]) -> None:
        self._made = made

    def on_end(self, span: ReadableSpan) -> None:
        self._made.append(span)
