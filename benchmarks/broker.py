"""Broker cost: ``append_many`` beside a bare ``XADD`` of the same bytes, in the same run.

Each arm has its own Redis, as the project starts it (append-only file, fsync every second). The
arms take turns, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.broker_arms import Arm, BrokerArm, Writer, XaddArm, example_payload
from benchmarks.machine import machine
from benchmarks.redis_cost import Snapshot, snapshot
from benchmarks.report import Result, Table, finish
from benchmarks.stats import paired_ratios, percentile, spread
from ringasync.observability.log import configure_logging


@dataclass(frozen=True)
class Settings:
    """How much is measured. Defaults take about a minute."""

    rounds: int = 5
    per_call: int = 64
    """Rollouts in one call: one flush window of a busy worker."""
    segment_tokens: int = 64
    segments: int = 16
    """Segments a rollout gets in a round: 16 x 64 tokens."""
    in_flight: int = 4
    """Clients that write at once in the throughput part: enough that Redis never waits."""
    batches: int = 8
    """Batches of ``per_call`` rollouts that each of them goes round."""
    vocab_size: int = 151_936
    """Above 65,536 an id takes 4 bytes, else 2. The default is Qwen3's."""
    clients: tuple[int, ...] = (1, 64, 1000)
    latency_per_call: int = 16
    latency_calls: int = 2000
    """Calls of all clients together, for each row of latencies; at least 2 a client."""
    steady_tokens_per_s: int = 500_000


@dataclass
class Measured:
    """What one arm cost, a round an element."""

    appends: list[int] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    client_cpu_s: list[float] = field(default_factory=list)
    cost: list[Snapshot] = field(default_factory=list)
    empty_memory_bytes: list[float] = field(default_factory=list)
    """Memory of a leased rollout before its first token: hash, history, share of the group."""
    empty_aof_bytes: list[float] = field(default_factory=list)

    def rates(self) -> list[float]:
        """Appends a second."""
        return [n / s for n, s in zip(self.appends, self.wall_s, strict=True)]

    def cpu_us(self) -> list[float]:
        """Redis CPU an append, all threads."""
        return [c.cpu_s / n * 1e6 for c, n in zip(self.cost, self.appends, strict=True)]

    def script_us(self) -> list[float]:
        """Of that, inside the script."""
        return [c.script_s / n * 1e6 for c, n in zip(self.cost, self.appends, strict=True)]

    def client_us(self) -> list[float]:
        """CPU of the benchmark's own process an append."""
        return [c / n * 1e6 for c, n in zip(self.client_cpu_s, self.appends, strict=True)]

    def bytes_a_token(self, what: str, segment_tokens: int) -> float:
        """``memory_bytes`` or ``aof_bytes`` over all rounds: one round's are rough."""
        total = sum(float(getattr(cost, what)) for cost in self.cost)
        return total / (sum(self.appends) * segment_tokens)


async def measure(settings: Settings) -> Result:
    """Run the whole comparison on two servers in a temporary folder."""
    payload = example_payload(settings.segment_tokens, settings.vocab_size)
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        arms: list[Arm] = [
            BrokerArm(Path(folder) / "broker", payload, settings.segment_tokens),
            XaddArm(Path(folder) / "xadd", payload),
        ]
        try:
            versions = [await arm.start() for arm in arms]
            measured = await _throughput(arms, settings)
            latencies = [row for n in settings.clients for row in await _latency(arms, n, settings)]
        finally:
            for arm in arms:
                await arm.stop()
    return _result(settings, versions[0], len(payload), measured, latencies)


async def _throughput(arms: Sequence[Arm], settings: Settings) -> dict[str, Measured]:
    measured = {arm.name: Measured() for arm in arms}
    for number in range(settings.rounds + 1):
        for arm in arms if number % 2 else reversed(arms):
            one = await _round(arm, settings, Measured())
            if number == 0:
                continue  # loads scripts, opens connections
            for name, values in vars(one).items():
                getattr(measured[arm.name], name).extend(values)
            print(f"  round {number}/{settings.rounds} {arm.name}: {one.rates()[0]:,.0f} appends/s")
    return measured


async def _round(arm: Arm, settings: Settings, into: Measured) -> Measured:
    clients, held = settings.in_flight, settings.per_call * settings.batches
    empty = await snapshot(arm.client)
    writers = await arm.writers(clients, settings.per_call, settings.batches)
    before = await snapshot(arm.client)
    cpu_s, began_s = time.process_time(), time.perf_counter()
    calls = settings.batches * settings.segments
    await _all(_as_fast_as_it_answers(writer, calls) for writer in writers)
    into.wall_s.append(time.perf_counter() - began_s)
    into.client_cpu_s.append(time.process_time() - cpu_s)
    into.cost.append(await snapshot(arm.client) - before)
    into.appends.append(clients * calls * settings.per_call)
    fed = before - empty
    into.empty_memory_bytes.append(fed.memory_bytes / (clients * held))
    into.empty_aof_bytes.append(fed.aof_bytes / (clients * held))
    return into


async def _all(clients: Iterable[Coroutine[Any, Any, list[float]]]) -> list[list[float]]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client) for client in clients]
    return [task.result() for task in tasks]


async def _as_fast_as_it_answers(writer: Writer, calls: int) -> list[float]:
    seconds = []
    for _ in range(calls):
        began_s = time.perf_counter()
        await writer()
        seconds.append(time.perf_counter() - began_s)
    return seconds


async def _steadily(writer: Writer, calls: int, interval_s: float) -> list[float]:
    """Latencies count from when a call was due, so that waiting behind an earlier one shows."""
    seconds = []
    due_s = time.perf_counter() + random.random() * interval_s
    for _ in range(calls):
        await asyncio.sleep(due_s - time.perf_counter())
        await writer()
        seconds.append(time.perf_counter() - due_s)
        due_s += interval_s
    return seconds


async def _latency(arms: Sequence[Arm], clients: int, settings: Settings) -> list[list[Any]]:
    """Rows: clients, load, arm, p50 ms, p99 ms, appends/s."""
    per_call, calls = settings.latency_per_call, max(2, settings.latency_calls // clients)
    tokens_a_call = per_call * settings.segment_tokens
    interval_s = clients * tokens_a_call / settings.steady_tokens_per_s
    rows = []
    for load in ("full", "steady"):
        for arm in arms:
            writers = await arm.writers(clients, per_call, 1)
            await _all(_as_fast_as_it_answers(writer, 1) for writer in writers)  # connections
            began_s = time.perf_counter()
            lists = await _all(
                _as_fast_as_it_answers(writer, calls)
                if load == "full"
                else _steadily(writer, calls, interval_s)
                for writer in writers
            )
            wall_s = time.perf_counter() - began_s
            ms = [seconds * 1e3 for some in lists for seconds in some]
            rate = len(ms) * per_call / wall_s
            rows.append([clients, load, arm.name, percentile(ms, 50), percentile(ms, 99), rate])
            print(f"  {clients} clients, {load}, {arm.name}: p99 {rows[-1][4]:.1f} ms")
    return rows


def _result(
    settings: Settings,
    version: str,
    payload_bytes: int,
    measured: dict[str, Measured],
    latencies: list[list[Any]],
) -> Result:
    ours, bare = measured["append_many"], measured["XADD"]
    tokens = settings.segment_tokens
    ratios = {
        "appends_per_s": spread(paired_ratios(ours.rates(), bare.rates())),
        "redis_cpu": spread(paired_ratios(ours.cpu_us(), bare.cpu_us())),
    }
    figures: dict[str, Any] = {
        name: {
            "appends_per_s": spread(arm.rates()).median,
            "tokens_per_s": spread(arm.rates()).median * tokens,
            "redis_cpu_us_per_append": spread(arm.cpu_us()).median,
            "redis_cpu_ns_per_token": spread(arm.cpu_us()).median * 1e3 / tokens,
            "script_us_per_append": spread(arm.script_us()).median,
            "client_cpu_us_per_append": spread(arm.client_us()).median,
            "memory_bytes_per_token": arm.bytes_a_token("memory_bytes", tokens),
            "aof_bytes_per_token": arm.bytes_a_token("aof_bytes", tokens),
            "memory_bytes_per_empty_rollout": spread(arm.empty_memory_bytes).median,
            "aof_bytes_per_empty_rollout": spread(arm.empty_aof_bytes).median,
        }
        for name, arm in measured.items()
    }
    rows = [
        [name.replace("_", " "), figures["append_many"][name], bare_value, _ratio(figures, name)]
        for name, bare_value in figures["XADD"].items()
    ]
    columns = ["clients", "load", "arm", "p50 ms", "p99 ms", "appends/s"]
    return Result(
        name=f"Broker (Redis {version}, payload {payload_bytes} bytes for {tokens} tokens)",
        settings=asdict(settings),
        figures=figures
        | {f"ratio_{name}": asdict(value) for name, value in ratios.items()}
        | {"latency": [dict(zip(columns, row, strict=True)) for row in latencies]},
        tables=[
            Table(
                "Cost, median of rounds",
                ["", "append_many", "XADD", "ratio"],
                rows,
                f"Ratio of the same round, median (lowest to highest): appends/s "
                f"{ratios['appends_per_s']}, Redis CPU {ratios['redis_cpu']}.",
            ),
            Table(
                "Latency of one call",
                columns,
                [[str(row[0]), *row[1:]] for row in latencies],
                f"One call: {settings.latency_per_call} rollouts. full: each client calls again "
                f"as soon as it has its answer. steady: {settings.steady_tokens_per_s:,} tokens/s "
                "of all clients together, counted from when a call was due.",
            ),
        ],
    )


def _ratio(figures: dict[str, Any], name: str) -> float | str:
    ours, bare = figures["append_many"][name], figures["XADD"][name]
    return ours / bare if bare else "-"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of the throughput part.", min=1)] = 5,
    vocab_size: Annotated[int, typer.Option(help="Above 65536 ids take 4 bytes.")] = 151_936,
    clients: Annotated[list[int] | None, typer.Option(help="Clients; repeat the option.")] = None,
    latency_calls: Annotated[int, typer.Option(help="Calls for each row of latencies.")] = 2000,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Cost of append_many beside a bare XADD of the same bytes."""
    where = machine()
    configure_logging("bench", "bench", None, "warning")
    settings = Settings(
        rounds=rounds,
        vocab_size=vocab_size,
        clients=tuple(clients or Settings.clients),
        latency_calls=latency_calls,
    )
    finish([uvloop.run(measure(settings))], where, out)


if __name__ == "__main__":
    typer.run(main)
