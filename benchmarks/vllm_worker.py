"""Worker speed with vLLM: a bare AsyncLLM, our engine alone, and the real worker, turn by turn.

Same weights, prompts, lengths and engine arguments. The bare AsyncLLM and our engine are both alive
on one device, each with its share of the memory; only one of them works at a time. The worker
writes to a real Redis in a process of its own. Grading is left out.
"""

from __future__ import annotations

import asyncio
import cProfile
import pstats
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import uvloop

from benchmarks.report import Cell, Result, Table, finish
from benchmarks.stats import Spread, paired_ratios, spread
from benchmarks.vllm_arms import ArmRound, PlainArm, watched
from benchmarks.vllm_models import (
    SHAPES,
    EngineSettings,
    Load,
    machine_with_gpu,
    parse_engine_args,
    total_tokens,
    write_model,
)
from benchmarks.worker_arms import Meter, WorkerRounds, bare_round
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.config.schema import Config
from ringasync.observability.log import configure_logging
from workers.engines.vllm import setup
from workers.engines.vllm.engine import VllmEngine
from workers.intake import ModelLimits

ARMS = ("asyncllm", "engine", "worker")
INTERVAL_ARM = "asyncllm-interval"
_MEAN_TOKENS = 600
_WARM_UP_SHARE = 4
"""The round that does not count has one in so many of the rollouts."""


@dataclass(frozen=True)
class Settings:
    """How much is measured. ``rollouts`` 0: two for each place in the batch."""

    model: str = "dense-300m"
    rounds: int = 3
    rollouts: int = 0
    group_size: int = 8
    length_scale: float = 1.0
    gpu_memory: float = 0.4
    gather_ms: int = 20
    interval: bool = False
    engine_args: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> tuple[str, ...]:
        """In the order of the first round."""
        return (*ARMS, INTERVAL_ARM) if self.interval else ARMS

    def load(self, concurrent: int, share: int = 1) -> Load:
        """What a round generates, or ``1/share`` of it."""
        rollouts = max((self.rollouts or 2 * concurrent) // share, min(concurrent, 64))
        vocabulary = SHAPES[self.model]["vocab_size"]
        return Load(rollouts, _MEAN_TOKENS * self.length_scale, vocabulary, self.group_size)


class Bench:
    """The engines of one level of concurrency, started as far as ``arms`` need them."""

    def __init__(self, settings: Settings, concurrent: int, weights: Path, root: Path) -> None:
        self._settings, self._concurrent, self._root = settings, concurrent, root
        load = settings.load(concurrent)
        engines = EngineSettings(
            concurrent,
            load.window_tokens,
            settings.gpu_memory,
            settings.gather_ms,
            engine_args=settings.engine_args,
        )
        self._weights = weights
        self._plain = {
            "asyncllm": PlainArm(engines.plain_arguments(weights)),
            INTERVAL_ARM: PlainArm(engines.plain_arguments(weights, stream_interval=16)),
        }
        self._engine: VllmEngine = engines.make()
        self._meter = Meter(self._engine)
        self._server = EmbeddedRedis(root / "redis")
        self._worker: WorkerRounds | None = None
        self._salt = 0

    async def start(self, arms: Sequence[str]) -> None:
        """One after the other: each looks at how much memory is free."""
        for name in arms:
            if name in self._plain:
                print(f"  starting {name}", flush=True)
                await self._plain[name].start()
        if "engine" in arms or "worker" in arms:
            print("  starting engine", flush=True)
            await self._engine.start(self._weights, 1)
        if "worker" in arms:
            load = self._settings.load(self._concurrent)
            self._worker = WorkerRounds(
                make_config(load, self._concurrent, self._root),
                await self._server.start(),
                self._weights,
                ModelLimits(load.window_tokens, (), load.vocab_size),
            )

    async def stop(self) -> None:
        """Everything that was started; safe after a failure."""
        try:
            for arm in self._plain.values():
                await arm.stop()
            await self._engine.stop()
        finally:
            await self._server.stop()

    async def round(self, arm: str, share: int = 1) -> ArmRound:
        """One round, with prompts that no prefix cache knows."""
        self._salt += 1
        groups = self._settings.load(self._concurrent, share).groups(self._salt)
        total = total_tokens(groups)
        if arm in self._plain:
            plain = self._plain[arm]
            speed, full = await watched(plain.round(groups), lambda: plain.tokens, total)
            return ArmRound(speed, full)
        before = self._engine.prompt_tokens
        if arm == "engine":
            call = bare_round(self._meter, groups)
        else:
            assert self._worker is not None, "the worker's round needs a started Redis"
            call = self._worker.round(self._meter, groups)
        speed, full = await watched(call, lambda: self._meter.tokens, total)
        # Every round publishes the weights anew.
        await asyncio.to_thread(shutil.rmtree, self._root / "runs", True)
        prompt, cached = (b - a for a, b in zip(before, self._engine.prompt_tokens, strict=True))
        return ArmRound(speed, full, prompt, cached)


async def measure(settings: Settings, concurrent: int, weights: Path) -> Result:
    """All arms ``rounds`` times, after one shorter round each that does not count."""
    found: dict[str, list[ArmRound]] = {arm: [] for arm in settings.arms}
    print(f"{settings.model}, {concurrent} at once", flush=True)
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        bench = Bench(settings, concurrent, weights, Path(folder))
        try:
            await bench.start(settings.arms)
            for number in range(settings.rounds + 1):
                for arm in settings.arms if number % 2 else reversed(settings.arms):
                    one = await bench.round(arm, 1 if number else _WARM_UP_SHARE)
                    _say(settings, number, arm, one)
                    if number:
                        found[arm].append(one)
        finally:
            await bench.stop()
    return _result(settings, concurrent, found)


async def profile(settings: Settings, concurrent: int, weights: Path, arm: str) -> None:
    """One round of one arm under cProfile, which slows the interpreter to about half."""
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        bench = Bench(settings, concurrent, weights, Path(folder))
        try:
            await bench.start([arm])
            await bench.round(arm, _WARM_UP_SHARE)
            profiler = cProfile.Profile()
            profiler.enable()
            one = await bench.round(arm)
            profiler.disable()
        finally:
            await bench.stop()
    _say(settings, 1, f"{arm} under cProfile", one)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def make_config(load: Load, concurrent: int, root: Path) -> Config:
    """A worker as the shipped configurations have it."""
    return Config.model_validate(
        {
            "run": {"dir": root / "runs"},
            "model": {"max_model_len_tokens": load.window_tokens},
            "sampling": {"max_new_tokens": load.longest},
            "data": {"tasks": [{"name": "bench", "kind": "jsonl"}]},
            "worker": {"max_concurrent": concurrent},
        }
    )


def _say(settings: Settings, number: int, arm: str, one: ArmRound) -> None:
    name = f"round {number}/{settings.rounds}" if number else "warm-up"
    print(
        f"  {name} {arm}: {one.speed.tokens_per_s:,.0f} tokens/s, batch full "
        f"{one.full_tokens_per_s:,.0f}, {one.speed.cpu_us_per_token:.1f} us CPU a token, "
        f"prompt tokens {one.prompt_tokens:,} ({one.cached_prompt_tokens:,} cached)",
        flush=True,
    )


def _result(settings: Settings, concurrent: int, found: dict[str, list[ArmRound]]) -> Result:
    kinds = {
        "tokens/s": {arm: [o.speed.tokens_per_s for o in rounds] for arm, rounds in found.items()},
        "tokens/s, batch full": {
            arm: [o.full_tokens_per_s for o in rounds] for arm, rounds in found.items()
        },
        "CPU us a token": {
            arm: [o.speed.cpu_us_per_token for o in rounds] for arm, rounds in found.items()
        },
    }
    figures: dict[str, Any] = {"concurrent": concurrent}
    rows: list[list[Cell]] = []
    for name, values in kinds.items():
        for arm in settings.arms:
            figures[f"{arm} {name}"] = asdict(spread(values[arm]))
            rows.append(_row(f"{arm}, {name}", spread(values[arm])))
        for bottom in [arm for arm in settings.arms if arm != "worker"]:
            if 0 in values[bottom]:  # too short a round to see a full batch
                continue
            ratio = spread(paired_ratios(values["worker"], values[bottom]))
            figures[f"worker over {bottom} {name}"] = asdict(ratio)
            rows.append(_row(f"worker over {bottom}, {name}", ratio))
    prompts: list[list[Cell]] = []
    for arm in ("engine", "worker"):
        total = sum(o.prompt_tokens for o in found[arm])
        cached = sum(o.cached_prompt_tokens for o in found[arm])
        figures[f"{arm} prompt tokens"] = {"all": total, "cached": cached}
        prompts.append([arm, float(total), float(cached), float(total - cached)])
    load = settings.load(concurrent)
    tokens = total_tokens(load.groups(0))
    return Result(
        name=f"Worker with vLLM, {settings.model}, {concurrent} at once",
        settings=asdict(settings) | {"concurrent": concurrent, "tokens_a_round": tokens},
        figures=figures,
        tables=[
            Table("Speed", ["", "median", "lowest", "highest"], rows),
            Table("Prompt tokens, all rounds", ["arm", "all", "cached", "computed"], prompts),
        ],
        notes=[
            "Ratios are taken within each round. CPU is that of the front-end process, all "
            "threads, EngineCore and Redis left out.",
            "The batch is taken for full between a tenth and half of a round's tokens.",
        ],
    )


def _row(name: str, found: Spread) -> list[Cell]:
    return [name, found.median, found.low, found.high]


def main(
    model: Annotated[str, typer.Option(help=", ".join(SHAPES))] = Settings.model,
    concurrent: Annotated[list[int] | None, typer.Option(help="At once; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = Settings.rounds,
    rollouts: Annotated[int, typer.Option(help="A round; 0: twice the concurrent ones.")] = 0,
    length_scale: Annotated[float, typer.Option(help="1: responses of 600 tokens.")] = 1.0,
    gpu_memory: Annotated[float, typer.Option(help="Share for each engine.")] = 0.4,
    gather_ms: Annotated[int, typer.Option(min=0)] = Settings.gather_ms,
    interval: Annotated[bool, typer.Option(help="A third engine, stream_interval=16.")] = False,
    engine_args: Annotated[str, typer.Option(help="JSON, for all engines.")] = "{}",
    profile_arm: Annotated[str, typer.Option("--profile", help="Only profile this arm.")] = "",
    model_dir: Annotated[Path | None, typer.Option(help="Keep the model here.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Tokens/s of the worker over those of a bare AsyncLLM and of its own engine."""
    if model not in SHAPES:
        raise typer.BadParameter(f"must be one of {', '.join(SHAPES)}", param_hint="--model")
    if profile_arm and profile_arm not in (*ARMS, INTERVAL_ARM):
        raise typer.BadParameter("is no arm", param_hint="--profile")
    configure_logging("bench", "bench", None, "warning")
    setup.prepare()
    where = machine_with_gpu()
    settings = Settings(
        model=model,
        rounds=rounds,
        rollouts=rollouts,
        length_scale=length_scale,
        gpu_memory=min(gpu_memory, 0.28) if interval else gpu_memory,
        gather_ms=gather_ms,
        interval=interval,
        engine_args=parse_engine_args(engine_args),
    )
    with tempfile.TemporaryDirectory(prefix="ringasync-model-") as folder:
        weights = write_model((model_dir or Path(folder)) / model, model)
        results = []
        for level in concurrent or [256, 1024]:
            if profile_arm:
                uvloop.run(profile(settings, level, weights, profile_arm))
            else:
                results.append(uvloop.run(measure(settings, level, weights)))
                finish(results[-1:], where, out.with_name(f"{out.name}-{level}") if out else None)


if __name__ == "__main__":
    typer.run(main)
