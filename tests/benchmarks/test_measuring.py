"""The measurements themselves, tiny but real: real Redis, real broker, real worker."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis.asyncio import Redis

from benchmarks import broker, worker
from benchmarks.broker_arms import BrokerArm, XaddArm, example_payload
from benchmarks.redis_cost import prepare, snapshot
from benchmarks.worker_arms import Meter
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.records.segment import decode_segment
from workers.engines.base import GenerationRequest, SamplingParams
from workers.engines.scripted import ScriptedEngine, write_scripted_weights


def test_payload_is_a_segment_with_ids_of_the_vocabulary() -> None:
    small, large = (example_payload(64, vocab) for vocab in (1000, 151_936))
    assert decode_segment(small).num_tokens == decode_segment(large).num_tokens == 64
    assert len(large) - len(small) == 2 * 64 + 1  # two bytes more an id, one for the length


async def test_redis_cost_counts_what_was_written(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    client = Redis.from_url(await server.start())
    try:
        await prepare(client)
        before = await snapshot(client)
        for number in range(100):
            await client.set(f"k{number}", "x" * 2000)
        cost = await snapshot(client) - before
        assert 200_000 <= cost.memory_bytes <= 400_000
        assert 200_000 <= cost.aof_bytes <= 220_000
        # Redis reads the process's counters before the thread's, each in whole microseconds.
        assert 0 < cost.main_thread_cpu_s <= cost.cpu_s + 5e-5
    finally:
        await client.aclose()
        await server.stop()


@pytest.mark.parametrize("clients", [1, 60])  # 60 need a second pool of connections
async def test_arms_store_every_segment(tmp_path: Path, clients: int) -> None:
    payload = example_payload(8, 1000)
    ours, bare = BrokerArm(tmp_path / "a", payload, 8), XaddArm(tmp_path / "b", payload)
    try:
        await ours.start()
        await bare.start()
        for arm in (ours, bare):
            for writer in await arm.writers(clients, 2, 2):
                for _ in range(4):  # two batches of two rollouts, twice round
                    await writer()
        report = await ours.broker.audit()
        assert report.balanced, report
        assert report.accepted_tokens == clients * 2 * 4 * 8
        assert await bare.client.xlen("segments") == clients * 2 * 4
    finally:
        await ours.stop()
        await bare.stop()


async def test_broker_benchmark() -> None:
    settings = broker.Settings(
        rounds=2,
        per_call=16,
        segments=16,
        in_flight=2,
        batches=2,
        clients=(1, 5),
        latency_per_call=2,
        latency_calls=10,
    )
    result = await broker.measure(settings)
    payload = len(example_payload(64, settings.vocab_size)) / 64
    for arm in ("append_many", "XADD"):
        figures = result.figures[arm]
        assert figures["tokens_per_s"] == pytest.approx(64 * figures["appends_per_s"])
        assert payload <= figures["aof_bytes_per_token"] < 2 * payload
        # A little less may show: the server frees buffers that feeding had grown.
        assert 0.8 * payload <= figures["memory_bytes_per_token"] < 2 * payload
        assert figures["redis_cpu_us_per_append"] > 0
    assert result.figures["append_many"]["memory_bytes_per_empty_rollout"] > 100
    latency = result.figures["latency"]
    assert len(latency) == 2 * 2 * 2  # client counts, loads, arms
    assert all(0 < row["p50 ms"] <= row["p99 ms"] for row in latency)


async def test_worker_benchmark() -> None:
    settings = worker.Settings(
        rounds=1, engine="scripted", rollouts=12, concurrent=4, group_size=4, flush_ms=20
    )
    result = await worker.measure(settings)
    ratio = result.figures["worker_over_engine"]
    assert 0 < ratio["median"] < 10
    assert ratio["low"] == ratio["high"] == ratio["median"]
    assert result.figures["engine tokens/s"]["median"] > 0


async def test_meter_counts_tokens_and_never_stops_the_engine(tmp_path: Path) -> None:
    engine = ScriptedEngine(SamplingParams(1.0, ()))
    await engine.start(write_scripted_weights(tmp_path, 1.0), 1)
    meter = Meter(engine)
    try:
        with pytest.raises(ValueError, match="nothing was generated"):
            meter.speed()
        await meter.start(tmp_path, 1)
        await meter.generate([GenerationRequest("a", (1, 2), (), 5, 0)])
        while not meter.finished:
            await meter.outputs()
        await meter.stop()
        assert (meter.tokens, meter.finished, engine.active) == (5, 1, 0)
        assert meter.speed().tokens_per_s > 0
        meter.reset()
        assert meter.tokens == 0
        await meter.generate([GenerationRequest("b", (1, 2), (), 3, 0)])
        while not meter.finished:
            await meter.outputs()
        assert meter.tokens == 3
    finally:
        await engine.stop()
