"""Keeps the roles of one run alive on this machine until the run is done, or says why it cannot."""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ringasync.clock import monotonic_s
from ringasync.runtime.process import RoleProcess, RoleSpec, describe_exit
from ringasync.runtime.shutdown import EXIT_INTERRUPTED, Shutdown

EXIT_INCOMPLETE = 1
"""All roles left in peace, yet the run is not done."""

HOPELESS_EXIT_CODES = frozenset({2, 3, 7, 70})
"""Configuration, environment, refused step, broken invariant: a restart meets them again."""

PEACEFUL_EXIT_CODES = frozenset({0, EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGKILL})
"""How a role may end once the whole run is ending."""

POLL_S = 0.3


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often a role that died is started again before the run is given up."""

    max_restarts: int = 6
    window_s: float = 300.0
    backoff_s: float = 0.5
    backoff_max_s: float = 15.0
    settle_s: float = 30.0
    """How long roles may take to leave by themselves once the run is done."""

    def pause_s(self, num_recent: int) -> float:
        """Pause before the restart that follows ``num_recent`` others within the window."""
        return float(min(self.backoff_max_s, self.backoff_s * 2**num_recent))


class Supervisor:
    """Starts every role, restarts what dies unexpectedly, and ends them all together.

    Consumes: exits of the roles; produces: restarts, and lines to ``say``. Waits for: the run to be
    done, a role that cannot be kept alive, or a request to stop; each unblocks it.
    """

    def __init__(
        self,
        specs: Sequence[RoleSpec],
        log_dir: Path,
        *,
        say: Callable[[str], None],
        policy: RestartPolicy | None = None,
        clock: Callable[[], float] = monotonic_s,
    ) -> None:
        self._specs, self._log_dir, self._say, self._clock = tuple(specs), log_dir, say, clock
        self._policy = policy or RestartPolicy()
        self._processes: dict[str, RoleProcess] = {}
        self._left: set[str] = set()
        self._ending = asyncio.Event()

    def running(self) -> dict[str, int]:
        """Process ids of the roles that run now, by role name."""
        return {name: p.pid for name, p in self._processes.items() if p.is_running}

    def kill_all(self) -> None:
        """SIGKILL every role with its children, at once. Safe inside a signal handler."""
        for process in tuple(self._processes.values()):
            process.kill_group()

    async def run(self, shutdown: Shutdown, is_done: Callable[[], Awaitable[bool]]) -> int:
        """Supervise to the end; no role's process outlives this call.

        ``is_done`` tells whether the run reached its end; it may raise, which ends the run.
        Returns 0 when the run is done, 130 when it was asked to stop before, else the exit code of
        the role that could not be kept alive (128 + signal number if a signal ended it).
        """
        self._log_dir.mkdir(parents=True, exist_ok=True)
        keepers = {spec.name: asyncio.create_task(self._keep(spec)) for spec in self._specs}
        try:
            code = await self._watch(keepers, shutdown, is_done)
        finally:
            await self._drain(keepers)
        return code

    async def _watch(
        self,
        keepers: dict[str, asyncio.Task[int]],
        shutdown: Shutdown,
        is_done: Callable[[], Awaitable[bool]],
    ) -> int:
        while True:
            if await is_done():
                await self._settle(keepers, shutdown)
                return 0
            if shutdown.is_requested:
                self._say(f"{shutdown.reason}: draining (once more to stop at once)")
                return EXIT_INTERRUPTED
            for keeper in keepers.values():
                if keeper.done() and keeper.result() != 0:
                    code = keeper.result()
                    return code if code > 0 else 128 - code
            if self._cannot_go_on():
                # The last one may have ended the run between the two looks.
                return 0 if await is_done() else self._incomplete()
            await shutdown.sleep(POLL_S)

    def _cannot_go_on(self) -> bool:
        essential = {spec.name for spec in self._specs if spec.essential}
        return bool(self._specs) and (essential or {s.name for s in self._specs}) <= self._left

    def _incomplete(self) -> int:
        self._say("every role that the run needs has left, but the run is not done")
        return EXIT_INCOMPLETE

    async def _settle(self, keepers: dict[str, asyncio.Task[int]], shutdown: Shutdown) -> None:
        """The run is done: let the roles write what they have to and leave by themselves."""
        self._ending.set()
        deadline = self._clock() + self._policy.settle_s
        while not all(keeper.done() for keeper in keepers.values()):
            if self._clock() > deadline or await shutdown.sleep(POLL_S / 3):
                return

    async def _keep(self, spec: RoleSpec) -> int:
        """Run one role until it leaves in peace (0) or cannot be kept alive (its code)."""
        deaths: deque[float] = deque()
        while True:
            process = await RoleProcess.start(spec, self._log_dir)
            self._processes[spec.name] = process
            if self._ending.is_set():
                process.terminate()  # the end was called while this one was starting
            code = await process.wait()
            process.kill_group()  # what the role left behind must not outlive it
            if self._ending.is_set() or code == 0:
                self._note_leaving(process, code)
                return 0
            if not await self._may_restart(process, code, deaths):
                return 0 if self._ending.is_set() else code

    def _note_leaving(self, process: RoleProcess, code: int) -> None:
        self._left.add(process.name)
        if code not in PEACEFUL_EXIT_CODES:
            self._say(f"{process.name} ended: {describe_exit(code)} (see {process.log_path})")
        elif not self._ending.is_set():
            self._say(f"{process.name} left ({describe_exit(code)})")

    async def _may_restart(self, process: RoleProcess, code: int, deaths: deque[float]) -> bool:
        """Tell of the death and wait for the time of the next start; False: give up."""
        name, policy, now = process.name, self._policy, self._clock()
        while deaths and now - deaths[0] > policy.window_s:
            deaths.popleft()
        if code in HOPELESS_EXIT_CODES or len(deaths) >= policy.max_restarts:
            why = f"after {len(deaths)} restarts in {policy.window_s:g} s"
            if code in HOPELESS_EXIT_CODES:
                why = "which a restart does not change"
            self._say(f"{name} ended: {describe_exit(code)}, {why}; its log {process.log_path}:")
            self._say(process.log_tail())
            return False
        pause_s = policy.pause_s(len(deaths))
        deaths.append(now)
        self._say(
            f"{name} (pid {process.pid}) ended: {describe_exit(code)}; restart {len(deaths)} of "
            f"{policy.max_restarts} in {pause_s:g} s"
        )
        try:
            async with asyncio.timeout(pause_s):
                await self._ending.wait()
        except TimeoutError:
            return True
        return False

    async def _drain(self, keepers: dict[str, asyncio.Task[int]]) -> None:
        """SIGTERM to all at once; SIGKILL to each that is still there after its own timeout."""
        self._ending.set()
        for process in self._processes.values():
            process.terminate()
        await asyncio.gather(*(self._end(spec, keepers[spec.name]) for spec in self._specs))

    async def _end(self, spec: RoleSpec, keeper: asyncio.Task[int]) -> None:
        _, pending = await asyncio.wait({keeper}, timeout=spec.drain_timeout_s)
        if not pending:
            return
        process = self._processes.get(spec.name)
        if process is not None:
            self._say(f"{spec.name} did not end within {spec.drain_timeout_s:g} s: killed")
            process.kill_group()
        await asyncio.wait({keeper}, timeout=5.0)
        keeper.cancel()
