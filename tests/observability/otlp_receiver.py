"""An OTLP/HTTP collector for tests: takes requests, keeps the spans."""

from __future__ import annotations

import gzip
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True, slots=True)
class Received:
    """One span as it came over the wire; ``resource`` and ``attributes`` are plain values."""

    trace: int
    id: int
    parent: int
    name: str
    begin_ns: int
    end_ns: int
    is_error: bool
    resource: dict[str, Any]
    attributes: dict[str, Any]


@dataclass
class Receiver:
    """``answer`` is the HTTP status that requests get; what a refused one held is not kept."""

    url: str = ""
    answer: int = 200
    spans: list[Received] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def by_trace(self) -> dict[int, list[Received]]:
        """Spans of each trace, in the order of their begin, the root first."""
        traces: dict[int, list[Received]] = defaultdict(list)
        for span in self.spans:
            traces[span.trace].append(span)
        for spans in traces.values():
            spans.sort(key=lambda span: (span.parent != 0, span.begin_ns))
        return traces


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A collector on a free port for as long as the block runs."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that http.server calls
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            receiver.headers.append({k.lower(): v for k, v in self.headers.items()})
            if receiver.answer == 200:
                receiver.spans += _spans(ExportTraceServiceRequest.FromString(body))
            self.send_response(receiver.answer)
            self.send_header("Content-Type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_address[1]}/v1/traces"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()


def _spans(request: Any) -> Iterator[Received]:
    for of_resource in request.resource_spans:
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield Received(
                    int.from_bytes(span.trace_id),
                    int.from_bytes(span.span_id),
                    int.from_bytes(span.parent_span_id),
                    span.name,
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    span.status.code == 2,
                    _values(of_resource.resource.attributes),
                    _values(span.attributes),
                )


def _values(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
