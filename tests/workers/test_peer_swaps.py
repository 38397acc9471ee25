"""A worker whose engine pulls: files are not read twice, and a rebuilt engine gets checked ones."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from ringasync.records.weights import PeerOffer, WeightManifest
from workers.engines.scripted import ScriptedEngine

from .world import World, until

MakeWorld = Callable[..., Coroutine[Any, Any, World]]
OFFER = PeerOffer(host_id="h", port=1, secret="s", timeout_s=1.0)


class PullingEngine(ScriptedEngine):
    """Says that it took what it was offered, and notes it; breaks on version 3."""

    checks_weights = True

    async def prepare(self, weights_dir: Path, manifest: WeightManifest | None = None) -> str:
        assert manifest is not None
        return "file" if manifest.peer is None else "socket"

    async def load_weights(self, weights_dir: Path, policy_version: int) -> None:
        if policy_version != 3:
            await super().load_weights(weights_dir, policy_version)


def damage(world: World, version: int) -> None:
    """Change the file's last byte, which a checksum sees and a size does not."""
    (path,) = (world.config.run_dir / "weights").glob(f"v{version:06d}-*/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


async def test_pulled_swaps_are_counted_apart(make_world: MakeWorld) -> None:
    world = await make_world()
    await world.publish(1, peer=OFFER)
    running = await world.start("w1", lambda s: PullingEngine(s, step_interval_s=0.001))
    weights = running.worker.weights
    checked = {}
    for version, peer in ((1, OFFER), (2, OFFER), (4, None)):
        if version > 1:
            await world.publish(version, peer=peer)
        await until(lambda: weights.loaded_number == version, f"version {version}")  # noqa: B023
        loaded = weights.loaded
        assert loaded is not None
        checked[version] = loaded.checked
    assert checked == {1: True, 2: False, 4: True}, "the first engine reads the files itself"
    await until(lambda: weights.swaps == 2, "both swaps to be counted")
    assert running.worker.status()["peer_swaps"] == 1


async def test_an_engine_is_not_rebuilt_on_files_that_were_never_compared(
    make_world: MakeWorld,
) -> None:
    world = await make_world()
    await world.publish(1, peer=OFFER)
    running = await world.start("w1", lambda s: PullingEngine(s, step_interval_s=0.001))
    weights = running.worker.weights
    await until(lambda: weights.loaded_number == 1, "version 1")
    await world.publish(2, peer=OFFER)
    await until(lambda: weights.loaded_number == 2, "version 2")
    damage(world, 2)
    await world.publish(3, peer=OFFER)  # fails its read-back, so the engine is rebuilt on 2
    assert running.task is not None
    await until(lambda: running.task.done(), "the worker to give up")
    assert "shard model.safetensors has checksum" in str(running.task.exception())
    assert len(running.engines) == 1
