"""The coordinator and an OTLP collector: what it is sent, and that a bad one costs nothing else."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("opentelemetry.sdk")

from ringasync.broker.client import Broker
from ringasync.coordinator.seat import Seat
from ringasync.coordinator.tracer import make_tracer
from ringasync.observability.lives import is_traced
from ringasync.runtime.shutdown import Shutdown
from tests.coordinator.crew import make_config
from tests.coordinator.test_whole_run import run_to_end
from tests.observability.otlp_receiver import receiving


async def ended(broker: Broker) -> list[str]:
    groups = await broker.ended_groups()
    assert len(groups) > 20
    return groups


@pytest.mark.parametrize("share", [1.0, 0.3])
async def test_every_group_of_the_share_is_sent_once(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker, share: float
) -> None:
    with receiving() as receiver:
        observability = {"tensorboard": False, "traces": receiver.url, "traces_share": share}
        config = make_config(tmp_path, run_name, observability=observability)
        await run_to_end(config, redis_url, live)
        roots = [span for span in receiver.spans if not span.parent]
        sent = [root.attributes["ringasync.rollout"] for root in roots]
        assert len(sent) == len(set(sent))
        groups = {rollout.rpartition(".")[0] for rollout in sent}
        assert groups == {one for one in await ended(live) if is_traced(one, share)}
        assert {root.resource["service.namespace"] for root in roots} == {run_name}
        # A later coordinator sends what Redis still lists again, under the same ids.
        before = {(span.trace, span.id, span.name) for span in receiver.spans}
        tracer = make_tracer(Seat(live, config, Shutdown()))
        assert tracer is not None
        await tracer.trace()
        tracer.close()
        assert {(span.trace, span.id, span.name) for span in receiver.spans} == before


async def test_a_collector_that_refuses_costs_its_traces_only(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker, capsys: Any
) -> None:
    with receiving() as receiver:
        receiver.answer = 401
        observability = {"tensorboard": False, "traces": receiver.url}
        config = make_config(tmp_path, run_name, observability=observability)
        await run_to_end(config, redis_url, live)
        said = capsys.readouterr()
        assert (said.out + said.err).count("traces are not taken") == 1
        assert receiver.headers
        assert receiver.spans == []


async def test_a_collector_that_is_not_there_holds_nothing_up(
    tmp_path: Path, run_name: str, redis_url: str, live: Broker
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1/traces"
    began_s = time.monotonic()
    observability = {"tensorboard": False, "traces": url}
    config = make_config(tmp_path, run_name, observability=observability)
    await run_to_end(config, redis_url, live)
    assert time.monotonic() - began_s < 45


async def test_without_the_setting_there_is_no_tracer(
    tmp_path: Path, run_name: str, live: Broker
) -> None:
    assert make_tracer(Seat(live, make_config(tmp_path, run_name), Shutdown())) is None
