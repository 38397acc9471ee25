"""What the learner does: reserve, commit, mark trained, publish; and recovery after a rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ringasync.broker.core import Arg, BrokerCore, fence_args, read_or_why, text
from ringasync.broker.types import (
    DeviceClaim,
    Fence,
    RawGroup,
    RawRollout,
    ReadyGroup,
    TrainedTokens,
    VersionInfo,
)
from ringasync.errors import InvariantError
from ringasync.records.prompt import read_prompt_ids
from ringasync.records.versions import staleness_steps

_PAYLOADS_A_CALL = 128


class TrainingMixin(BrokerCore):
    """The learner's scripts; all but the reads carry its fencing token."""

    async def ready_groups(self, count: int) -> list[ReadyGroup]:
        """Groups that may be reserved, oldest ready first."""
        rows = await self._script("ready_groups", count)
        return [
            ReadyGroup(text(gid), int(tokens), _low(text(versions)), text(domain))
            for gid, tokens, versions, domain in rows
        ]

    async def reserve(
        self,
        fence: Fence,
        batch_id: str,
        group_ids: Sequence[str],
        learner_step: int,
        max_staleness: int | None,
    ) -> tuple[list[RawGroup], list[str]]:
        """Reserve ready groups for a batch; returns them with payloads, and the stale ones' ids.

        A group whose oldest token is more than ``max_staleness`` learner steps old ends as stale
        (None: no limit); one that is not ready any more is left out. A repeat of ``batch_id``
        answers as the first. A ready group's versions and a version's step never change, so the
        check here and the script that acts on it cannot disagree.
        """
        stale = set(await self._stale(group_ids, learner_step, max_staleness))
        kept = [group_id for group_id in group_ids if group_id not in stale]
        reply = await self._script(
            "reserve", *fence_args(fence), batch_id, len(stale), *sorted(stale), *kept
        )
        rows, stale_text = reply
        sizes = {text(member[0]): int(member[4]) for row in rows for member in row[4:]}
        payloads = await self._payloads(list(sizes))
        for rollout_id, size in sizes.items():
            if len(payloads[rollout_id]) != size:
                raise InvariantError(
                    f"payload of {rollout_id} changed while batch {batch_id} was being read: "
                    "another learner acts on this run"
                )
        groups = [_raw_group(row, payloads) for row in rows]
        return groups, [part for part in text(stale_text).split(",") if part]

    async def _stale(
        self, group_ids: Sequence[str], learner_step: int, max_staleness: int | None
    ) -> list[str]:
        if not group_ids or max_staleness is None:
            return []
        steps = await self.version_steps()
        async with self._client.pipeline(transaction=False) as pipe:
            for group_id in group_ids:
                pipe.hget(self.keys.group(group_id), "versions")
            spans = await self._read(pipe.execute())
        oldest = [_low(text(span or b"")) for span in spans]
        ages = {v: staleness_steps(v, steps, learner_step) for v in set(oldest)}
        ages[0] = 0  # no policy token: nothing that could be stale
        too_old = {v for v, age in ages.items() if age is None or age > max_staleness}
        return [gid for gid, v in zip(group_ids, oldest, strict=True) if v in too_old]

    async def _payloads(self, rollout_ids: Sequence[str]) -> dict[str, tuple[bytes, ...]]:
        """Segments of reserved rollouts: nothing but their commit changes them."""
        found: dict[str, tuple[bytes, ...]] = {}
        for first in range(0, len(rollout_ids), _PAYLOADS_A_CALL):
            chunk = rollout_ids[first : first + _PAYLOADS_A_CALL]
            async with self._client.pipeline(transaction=False) as pipe:
                for rollout_id in chunk:
                    pipe.lrange(self.keys.segments(rollout_id), 0, -1)
                lists = await self._read(pipe.execute())
            found.update(zip(chunk, (tuple(each) for each in lists), strict=True))
        return found

    async def release(self, fence: Fence, batch_id: str) -> bool:
        """Give a batch that was not journalled back: reserved -> ready, in the old order."""
        return bool(await self._script("release", *fence_args(fence), batch_id))

    async def commit(
        self, fence: Fence, batch_id: str, trajectories_per_group: Mapping[str, int]
    ) -> bool:
        """The journal has the batch: reserved -> taken, payloads leave Redis.

        ``trajectories_per_group`` is how many of each group are still to be trained. False on a
        repeat. Raises ``InvariantError`` when a reserved group is not named.
        """
        args: list[Arg] = [part for item in trajectories_per_group.items() for part in item]
        return bool(await self._script("commit", *fence_args(fence), batch_id, *args))

    async def mark_trained(
        self, fence: Fence, batch_id: str, items: Sequence[TrainedTokens], learner_step: int
    ) -> bool:
        """Book a trained batch: taken -> trained and masked; False on a repeat of ``batch_id``.

        ``items`` may name groups taken by earlier batches (surplus trajectories). A group without
        open trajectories ends, and its tokens must be used up then (``InvariantError``).
        """
        args: list[Arg] = []
        for item in items:
            args += [item.group_id, item.trained_tokens, item.masked_tokens, item.open_trajectories]
        reply = await self._script(
            "mark_trained", *fence_args(fence), batch_id, learner_step, *args
        )
        return bool(reply)

    async def batches(self) -> dict[str, str]:
        """Known batches, oldest first: reserved, taken or trained (of these the last 1024)."""
        ids = [text(b) for b in await self._read(self._client.zrange(self.keys.batches, 0, -1))]
        async with self._client.pipeline(transaction=False) as pipe:
            for batch_id in ids:
                pipe.hget(self.keys.batch(batch_id), "state")
            states = await self._read(pipe.execute())
        return {b: text(state) for b, state in zip(ids, states, strict=True) if state}

    async def batch(self, batch_id: str) -> dict[str, str]:
        """One batch's fields; empty when unknown."""
        return await self._hash(self.keys.batch(batch_id))

    async def force_taken(
        self, fence: Fence, batch_id: str, groups: Mapping[str, tuple[int, int]]
    ) -> bool:
        """After Redis lost its tail: make a journalled batch's groups taken, whatever they are now.

        ``groups`` maps group id to (policy tokens by the journal, trajectories still to train).
        Tokens that the journal has and Redis lost come out of ``lost`` or are accepted again.
        False when the batch is taken or trained already.
        """
        args: list[Arg] = []
        for group_id, (tokens, trajectories) in groups.items():
            args += [group_id, tokens, trajectories]
        return bool(await self._script("force_taken", *fence_args(fence), batch_id, *args))

    # The device that learner and workers share

    async def take_device(self, fence: Fence, grace_ms: int) -> DeviceClaim:
        """Ask for the device, or look whether it is had by now. Repeats change nothing.

        ``grace_ms`` is what workers get after a new incarnation to open sessions again.
        """
        turn, *rows = await self._script("take_device", *fence_args(fence), grace_ms)
        names = [text(part) for part in rows]
        owed = zip(names[::3], names[1::3], names[2::3], strict=True)
        return DeviceClaim(
            int(turn),
            tuple(f"{name} ({doing}, heartbeat {age} ms ago)" for name, doing, age in owed),
        )

    async def return_device(self, fence: Fence, turn: int) -> bool:
        """The learner is off the device; False on a repeat."""
        return bool(await self._script("return_device", *fence_args(fence), turn))

    # Versions

    async def publish(self, fence: Fence, info: VersionInfo, keep: int = 8) -> None:
        """Announce a version; ``keep`` manifests stay in Redis.

        Raises ``WeightError`` unless the number is above every published one, and while two
        workers' verdicts block publication.
        """
        await self._script(
            "publish",
            *fence_args(fence),
            info.version,
            info.learner_step,
            info.fork_step,
            info.manifest,
            keep,
        )

    async def unblock_publication(self, fence: Fence) -> None:
        """Lift the block that bad versions set; the versions themselves stay bad."""
        await self._script("set_meta", *fence_args(fence), "publication_blocked", "")

    async def version(self, version: int | None = None) -> VersionInfo | None:
        """One announced version (None: the latest), while its manifest is kept."""
        if version is None:
            latest = await self._read(self._client.hget(self.keys.meta, "latest_version"))
            version = int(latest or 0)
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.hget(self.keys.versions, str(version))
            pipe.hget(self.keys.manifests, str(version))
            entry, manifest = await self._read(pipe.execute())
        if entry is None or manifest is None:
            return None
        step, fork = text(entry).split(":")
        return VersionInfo(version, int(step), int(fork), text(manifest))

    async def version_steps(self) -> dict[int, tuple[int, int]]:
        """Version -> (learner step, fork step), of the last 8192 versions."""
        steps = {}
        for version, entry in (await self._hash(self.keys.versions)).items():
            step, fork = entry.split(":")
            steps[int(version)] = (int(step), int(fork))
        return steps


def _low(versions: str) -> int:
    return int(versions.split("-")[0] or 0)


def _raw_group(row: list[Any], payloads: Mapping[str, tuple[bytes, ...]]) -> RawGroup:
    rollouts = tuple(
        RawRollout(
            rollout_id=text(rollout_id),
            reward=float(reward),
            finish_reason=text(finish),
            retention=int(retention),
            segments=payloads[text(rollout_id)],
        )
        for rollout_id, reward, finish, retention, _ in row[4:]
    )
    prompt_ids, unreadable = read_or_why(read_prompt_ids, row[2])
    return RawGroup(
        group_id=text(row[0]),
        domain=text(row[1]),
        prompt_ids=prompt_ids or (),
        source_index=int(row[3]),
        rollouts=rollouts,
        unreadable=unreadable,
    )
