"""Worker speed: tokens/s of the real rollout worker over those of its engine alone, in one run.

Same engine object, weights, prompts and lengths; the arms take turns. The worker writes to a real
Redis in a process of its own. Grading is left out: it runs in processes of its own, too.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import uvloop

from benchmarks.machine import machine
from benchmarks.report import Cell, Result, Table, finish
from benchmarks.stats import Spread, paired_ratios, spread
from benchmarks.worker_arms import Meter, Speed, WorkerRounds, bare_round
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.types import NewGroup
from ringasync.config.schema import Config
from ringasync.observability.log import configure_logging
from workers.engines.base import Engine, SamplingParams
from workers.engines.scripted import VOCAB_SIZE, ScriptedEngine, write_scripted_weights
from workers.intake import ModelLimits

_PROMPT_TOKENS = 24
_LENGTHS = (16, 32, 32, 64, 64, 96, 128, 224)
"""Response lengths of the groups in turn: a tail, so that slots are refilled one by one."""
WINDOW_TOKENS = 256


EngineKind = Literal["transformers", "scripted"]


@dataclass(frozen=True)
class Settings:
    """How much is measured. Defaults take about a minute."""

    rounds: int = 5
    engine: EngineKind = "transformers"
    rollouts: int = 192
    concurrent: int = 64
    group_size: int = 8
    flush_tokens: int = 64
    flush_ms: int = 500
    threads: int = 1


async def measure(settings: Settings) -> Result:
    """Run both arms ``rounds`` times, after one round each that does not count."""
    groups = make_groups(settings)
    speeds: dict[str, list[Speed]] = {"engine": [], "worker": []}
    with tempfile.TemporaryDirectory(prefix="ringasync-bench-") as folder:
        root = Path(folder)
        weights = write_model(root / "model", settings)
        server = EmbeddedRedis(root / "redis")
        engine = make_engine(settings)
        try:
            url = await server.start()
            await engine.start(weights, 1)
            meter = Meter(engine)
            worker = WorkerRounds(
                make_config(settings, root), url, weights, ModelLimits(WINDOW_TOKENS, ())
            )
            for number in range(settings.rounds + 1):
                for arm in ("engine", "worker") if number % 2 else ("worker", "engine"):
                    call = bare_round if arm == "engine" else worker.round
                    speed = await call(meter, groups)
                    if number:
                        speeds[arm].append(speed)
                        rate = f"{speed.tokens_per_s:,.0f} tokens/s"
                        print(f"  round {number}/{settings.rounds} {arm}: {rate}")
        finally:
            await engine.stop()
            await server.stop()
    return _result(settings, speeds)


def make_groups(settings: Settings) -> list[NewGroup]:
    """Prompts with fixed lengths: random weights never mean to stop, so both arms do the same."""
    return [
        NewGroup(
            group_id=f"g{number:06d}",
            kind="train",
            domain="bench",
            prompt="",
            prompt_ids=tuple((number + i) % VOCAB_SIZE for i in range(_PROMPT_TOKENS)),
            task={},
            source_index=number,
            size=settings.group_size,
            max_new_tokens=_LENGTHS[number % len(_LENGTHS)],
        )
        for number in range(-(-settings.rollouts // settings.group_size))
    ]


def make_config(settings: Settings, root: Path) -> Config:
    """The demo's settings where they matter to the worker."""
    return Config.model_validate(
        {
            "run": {"dir": root / "runs"},
            "model": {"max_model_len_tokens": WINDOW_TOKENS},
            "sampling": {"max_new_tokens": max(_LENGTHS)},
            "data": {"tasks": [{"name": "bench", "kind": "jsonl"}]},
            "worker": {
                "max_concurrent": settings.concurrent,
                "flush_tokens": settings.flush_tokens,
                "flush_ms": settings.flush_ms,
                "threads": settings.threads,
            },
        }
    )


def make_engine(settings: Settings) -> Engine:
    """The engine of the settings, not started."""
    sampling = SamplingParams(temperature=1.0, eos_token_ids=())
    if settings.engine == "scripted":
        return ScriptedEngine(sampling, max_concurrent=settings.concurrent)
    from workers.engines.transformers_engine import TransformersEngine

    return TransformersEngine(
        sampling,
        max_concurrent=settings.concurrent,
        max_model_len_tokens=WINDOW_TOKENS,
        seed=0,
        threads=settings.threads,
    )


def write_model(folder: Path, settings: Settings) -> Path:
    """Random weights for that engine; returns their folder."""
    if settings.engine == "scripted":
        return write_scripted_weights(folder, 1.0)
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=WINDOW_TOKENS,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def _result(settings: Settings, speeds: dict[str, list[Speed]]) -> Result:
    rates = {arm: [one.tokens_per_s for one in found] for arm, found in speeds.items()}
    cpu = {arm: [one.cpu_us_per_token for one in found] for arm, found in speeds.items()}
    ratio = spread(paired_ratios(rates["worker"], rates["engine"]))
    cpu_ratio = spread(paired_ratios(cpu["worker"], cpu["engine"]))
    figures: dict[str, Any] = {
        "worker_over_engine": asdict(ratio),
        "cpu_worker_over_engine": asdict(cpu_ratio),
    }
    rows: list[list[Cell]] = []
    for name, values in (("tokens/s", rates), ("CPU us a token", cpu)):
        for arm in ("engine", "worker"):
            figures[f"{arm} {name}"] = asdict(spread(values[arm]))
            rows.append(_row(f"{arm}, {name}", spread(values[arm])))
    rows.append(_row("tokens/s, worker over engine", ratio))
    rows.append(_row("CPU a token, worker over engine", cpu_ratio))
    return Result(
        name=f"Worker ({settings.engine} engine)",
        settings=asdict(settings),
        figures=figures,
        tables=[Table("Speed", ["", "median", "lowest", "highest"], rows)],
        notes=[
            "Ratios are taken within each round; aim of the first: 0.95 or more.",
            "CPU is that of the worker's process, Redis left out. With one thread to generate and "
            "a core to spare, tokens/s may hold where CPU rises.",
        ],
    )


def _row(name: str, found: Spread) -> list[Cell]:
    return [name, found.median, found.low, found.high]


def engine_of(name: str) -> EngineKind:
    """The engine that the option ``--engine`` names."""
    if name == "transformers":
        return "transformers"
    if name == "scripted":
        return "scripted"
    raise typer.BadParameter("must be transformers or scripted", param_hint="--engine")


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of both arms.", min=1)] = Settings.rounds,
    engine: Annotated[str, typer.Option(help="transformers or scripted.")] = Settings.engine,
    rollouts: Annotated[int, typer.Option(help="Rollouts a round.", min=1)] = Settings.rollouts,
    concurrent: Annotated[int, typer.Option(help="Generated at once.", min=1)] = 64,
    flush_tokens: Annotated[int, typer.Option(min=1)] = Settings.flush_tokens,
    flush_ms: Annotated[int, typer.Option(min=10)] = Settings.flush_ms,
    out: Annotated[Path | None, typer.Option(help="Write OUT.json and OUT.md.")] = None,
) -> None:
    """Tokens/s of the rollout worker over those of its bare engine."""
    kind, where = engine_of(engine), machine()
    configure_logging("bench", "bench", None, "warning")
    settings = Settings(
        rounds=rounds,
        engine=kind,
        rollouts=rollouts,
        concurrent=concurrent,
        flush_tokens=flush_tokens,
        flush_ms=flush_ms,
    )
    finish([uvloop.run(measure(settings))], where, out)


if __name__ == "__main__":
    typer.run(main)
