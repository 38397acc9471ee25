"""A role's figures for Prometheus, served by ``prometheus-client`` if ``metrics.port`` is set."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ringasync.config.schema import Config, MetricsConfig
from ringasync.observability.families import BASE_LABELS, FAMILIES, Family
from ringasync.observability.health import Health
from ringasync.observability.log import get_logger

PORT_OFFSETS = {"coordinator": 0, "learner": 1}
"""Roles that a run has once. All others take the first free port from ``SHARED_OFFSET`` on."""
SHARED_OFFSET = 2
SHARED_PORTS = 64
BEAT_S = 0.5

Value = float | dict[str, float]
log = get_logger(__name__)


class Exporter(Collector):
    """What a role last said of itself.

    Written by the role's event loop, read by the threads of the scrapes: each write puts a new
    mapping in the place of the old one, so that neither waits for the other. A value that is not
    known is not exported.
    """

    def __init__(
        self, run: str, role: str, worker: str = "", silent_after_s: float = math.inf
    ) -> None:
        self._labels = [run, role, worker]
        self.health = Health(dict(zip(BASE_LABELS, self._labels, strict=True)), silent_after_s)
        self._families = [family for family in FAMILIES if role in family.roles]
        self._split = {family.key: bool(family.label) for family in self._families}
        self._values: Mapping[str, Value] = {}

    def set(self, values: Mapping[str, object]) -> None:
        """Take over what the role exports of ``values``; None takes a value away.

        A status (with ``doing``) is also what the health endpoint tells.
        """
        self.health.say(values)
        fresh = {key: _value(values[key], split) for key, split in self._known(values)}
        merged = {**self._values, **fresh}
        self._values = {key: value for key, value in merged.items() if value is not None}

    def add(self, values: Mapping[str, object]) -> None:
        """Add to totals; what is no number adds nothing."""
        before = self._values
        sums: dict[str, Value] = {}
        for key, split in self._known(values):
            more = _value(values[key], split)
            if isinstance(more, dict):
                old = before.get(key)
                base = old if isinstance(old, dict) else {}
                sums[key] = {**base, **{name: base.get(name, 0) + n for name, n in more.items()}}
            elif more is not None:
                old = before.get(key, 0.0)
                sums[key] = more + (old if isinstance(old, float) else 0.0)
        self._values = {**before, **sums}

    def collect(self) -> Iterator[Metric]:
        """The present values, for a scrape."""
        values = self._values
        for family in self._families:
            if family.key in values:
                yield _metric(family, self._labels, values[family.key])

    def _known(self, values: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
        return ((key, self._split[key]) for key in values if key in self._split)


@asynccontextmanager
async def exporting(config: Config, role: str, worker: str = "") -> AsyncIterator[Exporter]:
    """A role's exporter, and its port for as long as the block runs, if one is wanted.

    A port that cannot be had costs a warning and the metrics, never the run.
    """
    silent_after_s = config.observability.stall_report_s
    exporter = Exporter(config.run.name, role, worker, silent_after_s)
    serving = _serve(config.metrics, role, exporter) if config.metrics.port else None
    if serving is None:
        yield exporter
        return
    beats = asyncio.create_task(_beat(exporter.health))
    try:
        yield exporter
    finally:
        beats.cancel()
        await asyncio.to_thread(_end, *serving)


async def _beat(health: Health) -> None:
    """Show that the loop moves. Consumes: time; produces: beats. Waits for ``BEAT_S``."""
    while True:
        health.beat()
        await asyncio.sleep(BEAT_S)


def ports_of(metrics: MetricsConfig, role: str) -> range:
    """The ports that ``role`` tries, first to last."""
    if role in PORT_OFFSETS:
        first = metrics.port + PORT_OFFSETS[role]
        return range(first, first + 1)
    return range(metrics.port + SHARED_OFFSET, metrics.port + SHARED_OFFSET + SHARED_PORTS)


def _serve(
    metrics: MetricsConfig, role: str, exporter: Exporter
) -> tuple[WSGIServer, Thread] | None:
    registry = CollectorRegistry()
    registry.register(exporter)
    ProcessCollector(registry=registry)
    why = ""
    for port in ports_of(metrics, role):
        try:
            server, thread = start_http_server(port, metrics.host, registry)
            if (served := server.get_app()) is not None:
                server.set_app(exporter.health.beside(served))
        except OSError as error:
            why = f"{metrics.host}:{port}: {error.strerror or error}"
            continue
        log.info("metrics are served", url=f"http://{metrics.host}:{port}/metrics")
        return server, thread
    log.warning("metrics are not served", why=why, remedy="set metrics.port or metrics.host")
    return None


def _end(server: WSGIServer, thread: Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join()


def _metric(family: Family, labels: list[str], value: Value) -> Metric:
    names = [*BASE_LABELS, *([family.label] if family.label else [])]
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.meaning, labels=names)
    if isinstance(value, dict):
        for name, number in value.items():
            metric.add_metric([*labels, name], number)
    else:
        metric.add_metric(labels, value)
    return metric


def _value(value: object, split: bool) -> Value | None:
    """A number, or for a metric that is split a mapping of numbers; None for anything else."""
    if split:
        items = value.items() if isinstance(value, Mapping) else ()
        numbers = ((str(name), _number(item)) for name, item in items)
        return {name: number for name, number in numbers if number is not None}
    return _number(value)


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
