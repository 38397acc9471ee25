"""One engine full of rollouts that takes up weights again and again, every part of it timed."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.stats import percentile
from benchmarks.vllm_models import SHAPES, EngineSettings, Load
from benchmarks.vllm_traffic import Rollout, Traffic, longest_gap, usual_gap
from ringasync.errors import CanaryError
from ringasync.records.weights import WeightManifest
from ringasync.weights.canary import compare_read_back
from ringasync.weights.manifest import VersionFields
from ringasync.weights.transport import Transport
from workers.engines.base import ScoreRequest

PARTS = ("fetch", "prepare", "pause", "load", "resume", "read_back", "score")
HELD = ("pause", "load", "resume")
_MEAN_TOKENS = 600
_CHECKED_TOKENS = 64
_MIN_CHECKED_TOKENS = 4
_SETTLE_LIMIT_S = 120.0
_WARM_UP_SWAPS = 2
"""One for each set of weights: their probe answers are what later ones are compared with."""


@dataclass(frozen=True)
class Settings:
    """How much is measured. ``change``: see ``write_changed``; far more than one training step."""

    model: str = "dense-300m"
    rollouts: int = 256
    swaps: int = 20
    transport: str = "file"
    change: float = 0.02
    length_scale: float = 2.0
    quiet_s: float = 1.0
    """Generation without anything else, before each swap: the usual interval between tokens."""
    after_s: float = 0.5
    """Generation after that, so that there are tokens to check."""
    checked: int = 8
    """Rollouts of each swap whose log-probs are computed anew under the new weights."""
    gather_ms: int = 1
    gpu_memory: float = 0.8
    engine_args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mode:
    """One way of taking weights up."""

    load: str
    kv: str
    staging: str

    def __str__(self) -> str:
        return f"{self.load}, kv {self.kv}, staged on {self.staging}"


@dataclass
class Found:
    """What all counted swaps of one mode gave. Seconds, nats."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    publish: list[float] = field(default_factory=list)
    inside: dict[str, list[float]] = field(default_factory=dict)
    """What the engine says of the inside of its load."""
    ways: list[str] = field(default_factory=list)
    """How each swap's tensors came: ``file``, ``socket`` or ``nccl``."""
    usual: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    probe_gaps: list[float] = field(default_factory=list)


class Swapper:
    """The worker's side of a swap, timed."""

    def __init__(self, settings: Settings, mode: Mode, folders: Sequence[Path], root: Path) -> None:
        self._settings, self._folders, self._root = settings, folders, root
        load = Load(
            settings.rollouts,
            _MEAN_TOKENS * settings.length_scale,
            SHAPES[settings.model]["vocab_size"],
        )
        self._engine = EngineSettings(
            settings.rollouts,
            load.window_tokens,
            settings.gpu_memory,
            settings.gather_ms,
            mode.load,
            mode.staging,
            mode.kv,  # type: ignore[arg-type]
            probe_places=True,
            engine_args=settings.engine_args,
        ).make()
        self._traffic = Traffic(self._engine, load)
        self._control = self._traffic.control
        self._probe = _probe(load.vocab_size)
        self._expected: dict[int, list[npt.NDArray[np.float32]]] = {}
        self._versions = itertools.count(1)
        self._loaded: WeightManifest | None = None
        self.found = Found()

    async def run(self, transport: Transport) -> None:
        """Start, swap as often as asked for, stop."""
        try:
            number = next(self._versions)
            self._loaded = await self._publish(transport, number)
            folder = await transport.fetch(self._loaded, self._root / "scratch")
            await self._control.start(folder, number)
            await self._traffic.start()
            for index in range(-_WARM_UP_SWAPS, self._settings.swaps):
                await self._swap(transport, index)
        finally:
            await self._traffic.stop()

    async def _swap(self, transport: Transport, index: int) -> None:
        number = next(self._versions)
        began_s = time.perf_counter()
        manifest = await self._publish(transport, number)
        published_s = time.perf_counter() - began_s
        quiet_s = time.perf_counter()
        await asyncio.sleep(self._settings.quiet_s)
        rollouts = list(self._traffic.running.values())
        clock = _Clock()
        folder = await transport.fetch(
            manifest, self._root / "scratch", contents=manifest.peer is None
        )
        clock.lap("fetch")
        way = await self._control.prepare(folder, manifest)
        clock.lap("prepare")
        await self._control.hold("weights")
        clock.lap("pause")
        await self._control.load(folder, number)
        clock.lap("load")
        await self._control.release("weights")
        clock.lap("resume")
        problems = compare_read_back(manifest, await self._control.read_back())
        clock.lap("read_back")
        scores = await self._control.score(self._probe)
        clock.lap("score")
        if problems:
            raise CanaryError("; ".join(problems))
        if self._loaded is not None:
            await transport.release(self._loaded)
        self._loaded = manifest
        await self._traffic.until_new_tokens(rollouts, number, _SETTLE_LIMIT_S)
        settled_s = time.perf_counter()
        await asyncio.sleep(self._settings.after_s)
        gap = self._compare_probe(number, scores)
        errors = await self._errors(rollouts, number)
        self._traffic.check()
        if index < 0:
            print(f"    warm-up: held {clock.total(HELD):.3f} s", flush=True)
            return
        stalls = self._note_gaps(rollouts, (quiet_s, clock.began_s, settled_s))
        self._note(clock, published_s, gap, errors)
        self.found.ways.append(way)
        print(
            f"    swap {index + 1}/{self._settings.swaps}: held {clock.total(HELD):.3f} s, stall "
            f"p50 {percent_of(stalls, 50):.3f} p99 {percent_of(stalls, 99):.3f} s over "
            f"{len(stalls)} rollouts, log-prob error {mean_of(errors):.4f}",
            flush=True,
        )

    async def _publish(self, transport: Transport, number: int) -> WeightManifest:
        fields = VersionFields("bench", number, number, 0, 1)
        return await transport.publish(self._folders[number % 2], fields)

    def _compare_probe(self, number: int, scores: list[npt.NDArray[np.float32]]) -> float:
        """Mean gap to the first answer of the same weights, which must be the nearer one."""
        own = self._expected.setdefault(number % 2, scores)
        other = self._expected.get((number + 1) % 2)
        gap = _gap(scores, own)
        if other is not None and gap >= _gap(scores, other):
            raise CanaryError(f"version {number} answers like the weights before it")
        return gap

    async def _errors(self, rollouts: Sequence[Rollout], number: int) -> list[float]:
        """|behavior log-prob - exact one| of tokens after the swap, whole context recomputed."""
        requests, sampled = [], []
        for rollout in rollouts:
            first = rollout.first_of_version.get(number, 0)
            tokens = rollout.tokens[first : first + _CHECKED_TOKENS]
            # Only those that had something of the old weights, and go on.
            if first and len(tokens) >= _MIN_CHECKED_TOKENS:
                context = (*rollout.request.prompt_ids, *rollout.tokens[:first])
                requests.append(ScoreRequest(context, tuple(tokens)))
                sampled.append(rollout.logprobs[first : first + len(tokens)])
        # Spread over all: rollouts that began together have like lengths.
        step = max(1, len(requests) // max(1, self._settings.checked))
        chosen = slice(0, step * self._settings.checked, step)
        exact = await self._control.score(requests[chosen])
        return [
            abs(float(a) - float(b))
            for row, true in zip(sampled[chosen], exact, strict=True)
            for a, b in zip(row, true, strict=True)
        ]

    def _note_gaps(
        self, rollouts: Sequence[Rollout], times: tuple[float, float, float]
    ) -> list[float]:
        quiet_s, began_s, settled_s = times
        stalls = []
        for rollout in rollouts:
            usual = usual_gap(rollout.arrivals, quiet_s, began_s)
            longest = longest_gap(rollout.arrivals, began_s, settled_s)
            if usual is not None and longest is not None:
                self.found.usual.append(usual)
                stalls.append(longest - usual)
        self.found.stalls += stalls
        return stalls

    def _note(self, clock: _Clock, published_s: float, gap: float, errors: list[float]) -> None:
        for part in PARTS:
            self.found.parts[part].append(clock.seconds[part])
        for part, seconds in self._engine.last_swap_s.items():
            self.found.inside.setdefault(part, []).append(seconds)
        self.found.publish.append(published_s)
        self.found.probe_gaps.append(gap)
        self.found.errors += errors


class _Clock:
    """Seconds of one part after the other."""

    def __init__(self) -> None:
        self.began_s = self._last_s = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """A part ends now."""
        now_s = time.perf_counter()
        self.seconds[part], self._last_s = now_s - self._last_s, now_s

    def total(self, parts: Sequence[str]) -> float:
        """Seconds of some parts together."""
        return sum(self.seconds[part] for part in parts)


def _probe(vocab_size: int) -> list[ScoreRequest]:
    """As many sequences as the learner publishes by default, of random ids."""
    random = np.random.default_rng(11)
    ids = random.integers(1, vocab_size, (8, 96)).tolist()
    return [ScoreRequest(tuple(row[:32]), tuple(row[32:])) for row in ids]


def _gap(a: Sequence[npt.NDArray[np.float32]], b: Sequence[npt.NDArray[np.float32]]) -> float:
    return float(np.abs(np.concatenate(a) - np.concatenate(b)).mean())


def percent_of(samples: Sequence[float], percent: float) -> float:
    """A percentile; 0 without samples."""
    return percentile(samples, percent) if samples else 0.0


def mean_of(samples: Sequence[float]) -> float:
    """The mean; 0 without samples."""
    return float(np.mean(samples)) if samples else 0.0
