"""What a person sees while the run goes on: the live view, or lines where there is no terminal."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable

from ringasync.broker.client import Broker
from ringasync.config.schema import Config

LINE_EVERY_S = 10.0
LINE_LOOK_S = 1.0


async def progress_lines(
    broker: Broker,
    config: Config,
    stop: asyncio.Event,
    say: Callable[[str], None],
    *,
    every_s: float = LINE_EVERY_S,
) -> None:
    """One line at each learner step that comes ``every_s`` after the last, and when all is quiet.

    Consumes the run's state in Redis; produces lines; waits for time to pass; ends when ``stop``
    is set.
    """
    began = time.monotonic()
    last_line, last_at = "", -every_s
    while not stop.is_set():
        now = time.monotonic()
        if now - last_at >= every_s:
            line = await state_line(broker, config)
            if line != last_line or now - last_at >= 6 * every_s:
                say(f"[{now - began:5.0f} s] {line}")
                last_line, last_at = line, now
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINE_LOOK_S):
                await stop.wait()


async def state_line(broker: Broker, config: Config) -> str:
    """The run in one line: phase, step, version, tokens, work at hand, who is there."""
    meta, ledger = await broker.run_meta(), await broker.ledger()
    backlog, sessions = await broker.backlog(), await broker.sessions()
    roles = Counter(session.get("role", "?") for session in sessions)
    parts = [
        f"{meta.get('phase', '?')}{' (paused)' if meta.get('paused') == '1' else ''}",
        f"step {meta.get('learner_step', '0')}/{config.learner.steps}",
        f"version {meta.get('latest_version', '0')}",
        f"{ledger['accepted']} tokens generated, {ledger['trained']} trained",
        f"{backlog.running_rollouts} rollouts running, {backlog.ready_groups} groups ready",
        ", ".join(f"{count} {role}{'s' * (count > 1)}" for role, count in sorted(roles.items()))
        or "nobody here yet",
    ]
    return " | ".join(parts)
