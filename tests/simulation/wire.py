"""Between the roles and Redis: each command is a step, at which the schedule may do something.

The commands go to a real server over one blocking connection, in the order of the virtual clock.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import redis
import redis.asyncio as aredis

from ringasync.broker import core
from ringasync.broker.keys import Keys

from .schedule import Fault, Schedule
from .virtual import EPOCH_S, NumberedTask, VirtualLoop

WIRE_S = 0.0002
"""A command takes so long to Redis, and its answer back."""
DISK_S = 0.001
TORCH_S = 0.03
DRAWN = b"""
local raw_call, raw_prefix = redis.call, KEYS[1]
local call = function(name, ...)
  local rest = { ... }
  if name == 'XADD' and rest[2] == '*' then
    rest[2] = raw_call('GET', raw_prefix .. 'sim_now') .. '-'
      .. raw_call('INCR', raw_prefix .. 'sim_id')
  elseif name == 'TIME' then
    return { math.floor(raw_call('GET', raw_prefix .. 'sim_now') / 1000), 0 }
  end
  return raw_call(name, unpack(rest))
end
local function sorted_members(key)
  local found = raw_call('SMEMBERS', key)
  table.sort(found)
  return found
end
"""
"""In the place of ``local call``: ids by the virtual clock, and sets in order."""


def no_chance(_name: str, script: bytes) -> bytes:
    """A script without what Redis draws: ids by the real clock, and the order of sets' members."""
    script = script.replace(b"\nlocal call = redis.call\n", DRAWN, 1)
    script = script.replace(b"redis.pcall('XADD'", b"call('XADD'")
    return script.replace(b"call('SMEMBERS', P .. ", b"sorted_members(P .. ")


@cache
def script_names() -> tuple[str, ...]:
    """All scripts of the broker."""
    folder = Path(core.__file__).with_name("scripts")
    return tuple(p.stem for p in sorted(folder.glob("*.lua")) if not p.stem.startswith("_"))


@dataclass
class Life:
    """One process of a role. What it does after its death reaches nobody."""

    role: str
    number: int
    alive: bool = True
    cut_until_s: float = 0.0
    tasks: list[NumberedTask] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.role}#{self.number}"


@dataclass(frozen=True)
class Step:
    """What happened: a command with its answer, work in a thread, or a fault."""

    number: int
    at_s: float
    who: str
    what: str
    args: tuple[Any, ...] = ()
    reply: Any = None

    def __str__(self) -> str:
        shown = ", ".join(_short(arg) for arg in self.args)
        reply = "" if self.reply is None else f" -> {_short(self.reply, 100)}"
        return f"{self.number:5d} {self.at_s:9.4f}s {self.who:14s} {self.what}({shown}){reply}"


def _in_order(reply: Any) -> Any:
    """Redis draws the order of a large hash anew in each process, and Python that of a set."""
    if isinstance(reply, set):
        return sorted(reply)
    if isinstance(reply, list):
        return [_in_order(part) for part in reply]
    return dict(sorted(reply.items())) if isinstance(reply, dict) else reply


def _short(value: Any, limit: int = 40) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


OnCommand = Callable[[Step, Life], None]


class Wire:
    """Carries commands and counts steps. ``on_command`` sees each one right after its effect."""

    def __init__(
        self,
        loop: VirtualLoop,
        server: redis.Redis,
        schedule: Schedule,
        keys: Keys,
        crash: Callable[[Life, int], None],
    ) -> None:
        self.loop, self.server, self._crash = loop, server, crash
        self.keys, self._prefix = keys, keys.prefix
        self._connection: Any = server.connection_pool.get_connection()
        self._faults = {fault.step: fault for fault in schedule.faults}
        self._saves = {
            max(0, fault.step - fault.ms): fault.step
            for fault in schedule.faults
            if fault.kind == "rollback"
        }
        self._saved: dict[int, dict[bytes, bytes]] = {}
        self._rng = random.Random(schedule.jitter) if schedule.jitter else None
        self._names = {core._digest(name, True): name for name in script_names()}
        for name in script_names():  # or the first run of a server would have other steps
            server.script_load(core.script_source(name, True))
        self._now_ms = -1
        self._jumped_ms = 0
        self.run_id = "server-1"
        self.num_steps = 0
        self.steps: list[Step] = []
        self.applied: list[Fault] = []
        self.on_command: OnCommand = lambda _step, _life: None
        self.on_rollback: Callable[[], None] = lambda: None

    def close(self) -> None:
        """Give the connection back."""
        self.server.connection_pool.release(self._connection)

    # Steps

    async def command(self, life: Life, args: tuple[Any, ...], run: Callable[[], Any]) -> Any:
        """One command of a role, there and back."""
        number, fault = self._next(life)
        await self._pause(life, WIRE_S + self._jitter_s())
        await self._held(life, fault)
        if life.cut_until_s > self.loop.time():
            await self._pause(life, life.cut_until_s - self.loop.time())
        reply = self._carry_out(number, life, args, run)
        if fault is not None and fault.kind == "repeat":
            await self._pause(life, fault.ms / 1000)
            reply = self._carry_out(number, life, args, run)
        await self._back(life, fault)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def thread(
        self, life: Life, func: Callable[..., Any], args: tuple[Any, ...], is_torch: bool
    ) -> asyncio.Future[Any]:
        """Work that production gives to a thread: a step whose effect is at once."""
        named = func.args[0] if isinstance(func, partial) else func  # asyncio.to_thread
        what = getattr(named, "__qualname__", type(named).__name__)

        async def work() -> Any:
            number, fault = self._next(life)
            await self._held(life, fault)
            try:
                result = func(*args)
            finally:
                self._note(Step(number, self.loop.time(), life.name, "thread", (what,)))
            await self._pause(life, TORCH_S if is_torch else DISK_S)
            await self._back(life, fault)
            return result

        return asyncio.ensure_future(work())

    def _next(self, life: Life) -> tuple[int, Fault | None]:
        """Number the step; apply what does not concern its timing."""
        self._check(life)
        number = self.num_steps
        self.num_steps += 1
        if number in self._saves:
            self._saved[self._saves[number]] = self._dump()
        fault = self._faults.get(number)
        if fault is None:
            return number, None
        self.applied.append(fault)
        self._note(Step(number, self.loop.time(), life.name, f"FAULT {fault.kind}", (fault.ms,)))
        if fault.kind == "jump":
            self._jumped_ms += fault.ms
        elif fault.kind == "cut":
            life.cut_until_s = self.loop.time() + fault.ms / 1000
        elif fault.kind == "rollback":
            self._roll_back(self._saved.get(number, {}))
        elif fault.kind == "crash_before":
            self._crash(life, fault.ms)
            self._check(life)
        return number, fault

    async def _held(self, life: Life, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "hold":
            await self._pause(life, fault.ms / 1000)

    async def _back(self, life: Life, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "crash_after":
            self._crash(life, fault.ms)
            self._check(life)
        late_s = fault.ms / 1000 if fault is not None and fault.kind == "late_answer" else 0.0
        await self._pause(life, WIRE_S + late_s + self._jitter_s())

    async def _pause(self, life: Life, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._check(life)

    def _check(self, life: Life) -> None:
        if not life.alive:
            raise asyncio.CancelledError

    def _jitter_s(self) -> float:
        """Mostly nothing, sometimes a little, rarely long."""
        if self._rng is None:
            return 0.0
        draw = self._rng.random()
        return 0.0 if draw < 0.5 else 0.004 * draw if draw < 0.97 else 0.08 * draw

    # Effects

    def _carry_out(
        self, number: int, life: Life, args: tuple[Any, ...], run: Callable[[], Any]
    ) -> Any:
        what = args[0]
        try:
            if what == "EVALSHA":
                what, shown = self._names.get(args[1], args[1]), args[4:]
                reply = self.script(args)
            else:
                shown = args[1:2]
                reply = run()
                if what == "INFO":
                    reply = {**reply, "run_id": self.run_id}
                reply = _in_order(reply)
        except redis.RedisError as error:
            return error
        step = Step(number, self.loop.time(), life.name, what, tuple(shown), reply)
        self._note(step)
        self.on_command(step, life)
        return reply

    def script(self, args: tuple[Any, ...]) -> Any:
        """A script under the virtual clock; the clock is set in the same round trip."""
        now_ms = int(EPOCH_S * 1000) + int(self.loop.time() * 1000) + self._jumped_ms
        connection = self._connection
        if now_ms == self._now_ms:
            connection.send_command(*args)
            return connection.read_response()
        self._now_ms = now_ms
        connection.send_packed_command(
            connection.pack_commands([("SET", f"{self._prefix}sim_now", now_ms), args])
        )
        connection.read_response()
        return connection.read_response()

    def peek(self, name: str, *args: Any) -> Any:
        """A script that is no step, for the checks."""
        return self.script(("EVALSHA", core._digest(name, True), 1, self._prefix, *args))

    def _note(self, step: Step) -> None:
        self.steps.append(step)

    # Rollback

    def _dump(self) -> dict[bytes, bytes]:
        keys = self._saved_keys()
        pipe = self.server.pipeline(transaction=False)
        for key in keys:
            pipe.dump(key)
        return {k: v for k, v in zip(keys, pipe.execute(), strict=True) if v is not None}

    def _saved_keys(self) -> list[bytes]:
        """All of the run but the clock and the count of stream entries, which only rise."""
        return sorted(
            k for k in self.server.scan_iter(self._prefix + "*", 1000) if b":sim_" not in k
        )

    def _roll_back(self, saved: dict[bytes, bytes]) -> None:
        """What a restarted Redis with a shorter append-only file would be, under a new run id."""
        if not saved:
            return
        pipe = self.server.pipeline(transaction=True)
        pipe.delete(*self._saved_keys())
        for key, value in saved.items():
            pipe.restore(key, 0, value)
        pipe.execute()
        self.run_id = f"server-{int(self.run_id.partition('-')[2]) + 1}"
        self.on_rollback()


class SimRedis(aredis.Redis):
    """The client of one life: redis-py's own commands, carried by the wire."""

    def __init__(self, wire: Wire, life: Life) -> None:
        super().__init__()
        self._wire, self._life = wire, life

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        server: Any = self._wire.server
        return await self._wire.command(
            self._life, args, lambda: server.execute_command(*args, **options)
        )

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Any:
        return SimPipeline(self._wire, self._life, transaction)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """There is one connection for all, and it is not this client's."""


class SimPipeline:
    """Commands that are gathered and sent as one step."""

    def __init__(self, wire: Wire, life: Life, transaction: bool) -> None:
        self._wire, self._life = wire, life
        self._pipe = wire.server.pipeline(transaction=transaction)

    async def __aenter__(self) -> SimPipeline:
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._pipe.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    async def execute(self) -> list[Any]:
        names = tuple(command[0][0] for command in self._pipe.command_stack)
        commands = list(self._pipe.command_stack)

        def run() -> list[Any]:
            self._pipe.command_stack = list(commands)  # again, when the answer was lost
            return self._pipe.execute()

        found: list[Any] = await self._wire.command(self._life, ("PIPELINE", names[:1]), run)
        return found
