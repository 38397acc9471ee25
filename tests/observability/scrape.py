"""Read what a role serves for Prometheus, with the library's own parser."""

from __future__ import annotations

import random
import socket
import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True)
class Sample:
    """One line of a scrape."""

    name: str
    labels: dict[str, str]
    value: float


def scrape(port: int, host: str = "127.0.0.1") -> list[Sample]:
    """All samples of ``http://HOST:PORT/metrics``. Raises ``OSError`` when nobody serves there."""
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return [
        Sample(sample.name, sample.labels, sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]


def free_ports(count: int = 6) -> int:
    """The first of some free ports in a row.

    Below the range that outgoing connections get their ports from: there a client that connects to
    a port where nobody listens may meet itself.
    """
    chance = random.Random()
    while True:
        first = chance.randrange(20_000, 30_000)
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


def own_names(samples: list[Sample]) -> set[str]:
    """Names of ringasync's metrics among the samples."""
    return {sample.name for sample in samples if sample.name.startswith("ringasync_")}
