"""Which policy version the engine serves and how it takes up another: fetch, swap, canary."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ringasync.broker.client import Broker
from ringasync.broker.types import Poll
from ringasync.errors import CanaryError, EngineError, ManifestError, SwapFailedError
from ringasync.observability.log import bind_identity, get_logger
from ringasync.records.weights import WeightManifest
from ringasync.runtime import crashpoints
from ringasync.weights.canary import ProbeGate, compare_read_back, probe_gaps
from ringasync.weights.manifest import load_manifest
from ringasync.weights.transport import Transport
from workers.buffers import RolloutStore
from workers.engine_control import DEVICE, EngineControl
from workers.engines.base import ScoreRequest

MAX_FETCHES = 3
"""Failed fetches after which a version is called bad; one that fails once may just be pruned."""

_FETCH_RETRY_S = 0.5

log = get_logger()


@dataclass(frozen=True, slots=True)
class Version:
    """A version whose files are here and pinned. ``checked``: their checksums too were compared."""

    manifest: WeightManifest
    folder: Path
    checked: bool = True

    @property
    def number(self) -> int:
        """The policy version."""
        return self.manifest.policy_version


class WeightKeeper:
    """Loads versions. ``loaded`` is the last that passed its canary; None before the first.

    While a version is on trial the store holds its tokens back.
    """

    def __init__(
        self,
        broker: Broker,
        transport: Transport,
        control: EngineControl,
        store: RolloutStore,
        gate: ProbeGate,
        scratch_dir: Path,
        *,
        use_canary: bool,
        report_bad: Callable[[int, str], Awaitable[None]],
        changed: asyncio.Event,
    ) -> None:
        self._broker = broker
        self._transport = transport
        self._control = control
        self._store = store
        self._gate = gate
        self._scratch_dir = scratch_dir
        self._use_canary = use_canary
        self._report_bad = report_bad
        self._changed = changed
        self._fetching: tuple[int, asyncio.Task[Version | None]] | None = None
        self._failed_fetches: dict[int, int] = {}
        self._gone: set[int] = set()
        """Versions that are superseded and not to be had any more: not bad, but passed over."""
        self.loaded: Version | None = None
        self.refused: dict[int, str] = {}
        self.swaps = 0
        self.peer_swaps = 0
        """Swaps whose tensors came out of the learner's memory."""
        self.swap_total_s = self.swap_paused_total_s = 0.0

    @property
    def loaded_number(self) -> int:
        """The loaded version; 0 before the first."""
        return self.loaded.number if self.loaded is not None else 0

    @property
    def figures(self) -> dict[str, int | float]:
        """What the heartbeat says of this life's swaps: how many, and the seconds of all of them
        (canary included, fetch left out), with the part in which the engine stood still; and the
        version that is being fetched."""
        return {
            "swaps": self.swaps,
            "peer_swaps": self.peer_swaps,
            "swap_total_s": round(self.swap_total_s, 6),
            "swap_paused_total_s": round(self.swap_paused_total_s, 6),
            "fetching_version": self._fetching[0] if self._fetching is not None else 0,
        }

    def wanted(self, poll: Poll) -> int | None:
        """The version to load next, or None: the pinned one, else the newest that is not bad.

        A worker that serves something waits for the latest; one that serves nothing yet goes down
        from the latest to the newest that may be loaded and can still be had.
        """
        unfit = {*self.refused, *poll.bad_versions}
        candidates: Iterable[int]
        if poll.pin_version is not None:
            candidates = (poll.pin_version,)
        else:
            unfit |= self._gone
            oldest = poll.latest_version if self.loaded is not None else 1
            candidates = range(poll.latest_version, oldest - 1, -1)
        number = next((candidate for candidate in candidates if candidate not in unfit), 0)
        return number if number > self.loaded_number else None

    async def fetched(self, number: int) -> Version | None:
        """The files of a version; None while they are on their way, or could not be had."""
        if self._fetching is None or self._fetching[0] != number:
            await self._drop_fetch()
            task = asyncio.create_task(self._fetch(number), name=f"fetch-{number}")
            task.add_done_callback(lambda _: self._changed.set())
            self._fetching = (number, task)
        task = self._fetching[1]
        if not task.done():
            return None
        self._fetching = None
        return await task

    async def start(self, version: Version) -> None:
        """Start an engine on a version and try it. Raises ``SwapFailedError``."""
        try:
            await self._control.start(version.folder, version.number)
            await self._try(version.manifest)
        except (CanaryError, EngineError) as error:
            await self._control.stop()
            await self._transport.release(version.manifest)
            raise SwapFailedError(version.number, str(error)) from error
        await self._accept(version)

    async def swap(self, version: Version, before_load: Callable[[], None]) -> None:
        """Take up a version in the middle of all rollouts. Raises ``SwapFailedError``.

        ``before_load`` is called when the engine stands still and every old token is in the store.
        Then the version is on trial: tokens that it samples wait in the store for the canary.
        """
        began_s = time.monotonic()
        try:
            way = await self._control.prepare(version.folder, version.manifest)
            paused_s = time.monotonic()
            await self._control.hold("weights")
            before_load()
            self._store.held_version = version.number
            await self._control.load(version.folder, version.number)
            crashpoints.reach("swapping")
            await self._control.wake(DEVICE)  # where it slept: loaded first, it wakes but once
            await self._control.release("weights")
            paused_s = time.monotonic() - paused_s
            await self._try(version.manifest)
        except (CanaryError, EngineError) as error:
            await self._transport.release(version.manifest)
            raise SwapFailedError(version.number, str(error)) from error
        await self._accept(version, way)
        self.swaps += 1
        self.peer_swaps += way != "file"
        self.swap_total_s += time.monotonic() - began_s
        self.swap_paused_total_s += paused_s

    async def restart(self) -> None:
        """A new engine on the last good version. Raises ``EngineError`` when that fails too."""
        await self._control.stop()
        self._store.held_version = None
        await self._control.release("weights")
        version = self.loaded
        if version is None:
            return
        try:
            if not version.checked:  # what the old engine pulled was; a new one reads the files
                await self._transport.fetch(version.manifest, self._scratch_dir)
                await self._transport.release(version.manifest)
            await self._control.start(version.folder, version.number)
            await self._try(version.manifest)
        except (CanaryError, ManifestError) as error:
            raise EngineError(
                f"a rebuilt engine does not answer as version {version.number}: {error}"
            ) from error
        log.info("engine rebuilt", version=version.number)

    async def close(self) -> None:
        """Drop pins and a fetch under way."""
        await self._drop_fetch()
        if self.loaded is not None:
            await self._transport.release(self.loaded.manifest)

    async def _fetch(self, number: int) -> Version | None:
        info = await self._broker.version(number)
        if info is None and number not in self._gone and await self._is_superseded(number):
            self._gone.add(number)  # announced versions only rise: it will not come back
            return None
        try:
            if info is None:
                raise ManifestError(f"version {number} is not announced any more")
            manifest = load_manifest(info.manifest)
            # The first engine reads the files by itself; a later one compares what it takes.
            lazy = self.loaded is not None and self._control.checks_weights
            contents = manifest.peer is None or not lazy
            folder = await self._transport.fetch(manifest, self._scratch_dir, contents=contents)
        except ManifestError as error:
            failures = self._failed_fetches.get(number, 0) + 1
            self._failed_fetches[number] = failures
            log.warning("weights not fetched", version=number, attempt=failures, error=str(error))
            if failures >= MAX_FETCHES:
                if await self._is_superseded(number):
                    self._gone.add(number)  # pruned, most likely
                else:
                    await self.refuse(number, f"cannot be fetched: {error}")
            # Until the next try the poll may bring a newer version: this one may be pruned.
            await asyncio.sleep(_FETCH_RETRY_S)
            return None
        return Version(manifest, folder, contents)

    async def _is_superseded(self, number: int) -> bool:
        newest = await self._broker.version(None)
        return newest is not None and newest.version > number

    async def refuse(self, number: int, why: str) -> None:
        """Never load this version here again, and say so to the run."""
        self.refused[number] = why
        log.error("version refused", version=number, why=why)
        await self._report_bad(number, why)

    async def _try(self, manifest: WeightManifest) -> None:
        """The canary: read-back, then the probe. Raises ``CanaryError``."""
        if not self._use_canary:
            return
        problems = compare_read_back(manifest, await self._control.read_back())
        if problems:
            raise CanaryError("; ".join(problems))
        if not manifest.probe:
            return
        scores = await self._control.score(
            [ScoreRequest(sequence.prompt_ids, sequence.token_ids) for sequence in manifest.probe]
        )
        result = self._gate.check(probe_gaps(manifest, scores))
        if not result.accepted:
            raise CanaryError(result.problem)
        log.debug("canary passed", gap_mean=result.gap_mean, gap_p99=result.gap_p99)

    async def _accept(self, version: Version, way: str = "file") -> None:
        previous, self.loaded = self.loaded, version
        self._store.held_version = None
        bind_identity(policy_version=version.number)
        log.info("weights taken up", version=version.number, way=way)
        if previous is not None:
            await self._transport.release(previous.manifest)

    async def _drop_fetch(self) -> None:
        if self._fetching is None:
            return
        _, task = self._fetching
        self._fetching = None
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            version = await task
            if version is not None:
                await self._transport.release(version.manifest)
