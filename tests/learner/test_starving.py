"""A learner that starves says so in its log, in `top` and on its health endpoint."""

from __future__ import annotations

from pathlib import Path

from tests.observability.scrape import free_ports
from tests.observability.test_stalls import get

from ..conftest import RedisServer
from .kit import Feeder, LearnerProcess, config_path, until


async def test_a_learner_without_ready_groups_is_named_everywhere(
    feeder: Feeder, tmp_path: Path, any_redis: RedisServer
) -> None:
    path, port = config_path(feeder), free_ports()
    path.write_text(path.read_text() + f"[metrics]\nport = {port}\n")
    learner = LearnerProcess.start(path, any_redis.url)
    try:

        async def stall() -> str:
            rows = await feeder.broker.sessions()
            return "".join(row.get("stall", "") for row in rows if row["role"] == "learner")

        async def named() -> bool:
            return "120 ready tokens" in await stall()

        await until(named, "the learner to be named", timeout_s=60)
        assert "owed by worker feeder: 0 leases, heartbeat" in await stall()
        assert "learner is waiting" in learner.log()

        async def told() -> bool:
            code, said = get(port + 1, "/healthz")
            return code == 503 and "120 ready tokens" in str(said["stalls"])

        await until(told, "the health endpoint to say so")
        assert get(port + 1, "/livez")[0] == 200
        await feeder.feed(14)

        async def well() -> bool:
            return await stall() == ""

        await until(well, "the stall to be taken back")
        assert await learner.wait() == 0, learner.log()
    finally:
        learner.stop()
