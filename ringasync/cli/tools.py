"""Commands that look at a run: live, or what is left of it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType

from ringasync.broker.client import Broker
from ringasync.broker.types import AuditReport
from ringasync.cli.options import RedisUrlOption, RunOption, RunsDirOption
from ringasync.cli.target import (
    Target,
    broker_of,
    config_of,
    resolve_run_dir,
    resolve_target,
    running_target,
)
from ringasync.errors import ConfigError
from ringasync.observability.record_views import (
    render_audit,
    render_failures,
    render_inspect,
    render_samples,
)
from ringasync.observability.run_metrics import FAILED_ENDS, read_run
from ringasync.runtime.roles import ROLE_MODULES
from ringasync.runtime.summary import read_summary, summary_lines

RUNS_DIR = Path("runs")
_OUTCOMES_A_CALL = 1000

_T = TypeVar("_T")


def ask(target: Target, question: Callable[[Broker], Awaitable[_T]]) -> _T:
    """Connect to the run's broker, ask, and give the answer back."""

    async def body() -> _T:
        async with broker_of(target) as broker:
            return await question(broker)

    return asyncio.run(body())


def health(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="coordinator, worker, ...")],
    run: RunOption = "",
    redis_url: RedisUrlOption = "",
    runs_dir: RunsDirOption = RUNS_DIR,
) -> None:
    """Ask Redis whether a role of this host sends heartbeats. Exit 0 it does, 1 not.

    For the health checks of containers, where a host is one role.

    Example: ringasync health worker --run demo
    """
    if role not in ROLE_MODULES:
        raise ConfigError(f"no role {role!r}: name one of {', '.join(ROLE_MODULES)}")
    host = socket.gethostname()
    found = [
        session
        for session in ask(resolve_target(run, redis_url, runs_dir), lambda b: b.sessions())
        if session["role"] == role and session.get("host") == host
    ]
    alive = [session for session in found if session.get("state") != "late"]
    for session in alive or found:
        typer.echo(f"{session['id']}: heartbeat {session['age_ms']} ms ago")
    if not alive:
        typer.echo(f"no {role} of host {host} sends heartbeats", err=True)
    raise typer.Exit(0 if alive else 1)


def top(
    run: RunOption = "", redis_url: RedisUrlOption = "", runs_dir: RunsDirOption = RUNS_DIR
) -> None:
    """Watch a run live: reward, tokens/s, staleness, queues, who does what. Ctrl-C leaves.

    Example (from another machine): ringasync top --run demo --redis-url redis://10.0.0.5:6379/0
    """
    target = running_target(run, redis_url, runs_dir)
    from ringasync.observability.view import live_view

    async def watch(broker: Broker) -> None:
        await live_view(broker, await config_of(broker), asyncio.Event())

    ask(target, watch)


def inspect(
    rollout: Annotated[str, typer.Argument(metavar="ROLLOUT", help="Its id, such as g000012.3.")],
    run: RunOption = "",
    redis_url: RedisUrlOption = "",
    runs_dir: RunsDirOption = RUNS_DIR,
) -> None:
    """Show the life of one rollout: when, who, which version, how many tokens, why.

    Exit code 1 when nothing is known of it: it never was, or its record is gone after an hour.

    Example: ringasync inspect g000012.3
    """
    target = resolve_target(run, redis_url, runs_dir)

    async def read(broker: Broker) -> tuple[RenderableType, bool]:
        fields, history = await broker.rollout(rollout), await broker.history(rollout)
        group = await broker.group(rollout.rpartition(".")[0])
        return render_inspect(rollout, fields, history, group), bool(fields or history)

    shown, found = ask(target, read)
    Console().print(shown)
    raise typer.Exit(0 if found else 1)


def samples(
    run: RunOption = "",
    redis_url: RedisUrlOption = "",
    runs_dir: RunsDirOption = RUNS_DIR,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many, newest first.")] = 8,
) -> None:
    """Show the newest graded answers as text with their rewards.

    Example: ringasync samples -n 20
    """
    target = resolve_target(run, redis_url, runs_dir)
    found = ask(target, lambda broker: broker.samples(count))
    Console().print(render_samples(found))


def audit(
    run: RunOption = "", redis_url: RedisUrlOption = "", runs_dir: RunsDirOption = RUNS_DIR
) -> None:
    """Recount every accepted token and compare with the accounts. Exit 0 balanced, 1 not.

    Works at any moment, also while workers are being killed. Below the accounts: how many groups
    ended quarantined or without a verdict, and why the last of them did.

    Example: ringasync audit --run demo
    """
    target = resolve_target(run, redis_url, runs_dir)

    async def read(broker: Broker) -> tuple[AuditReport, list[dict[str, Any]]]:
        return await broker.audit(), await _failures(target, broker)

    found, failures = ask(target, read)
    Console().print(render_audit(found))
    Console().print(render_failures(failures))
    raise typer.Exit(0 if found.balanced else 1)


async def _failures(target: Target, broker: Broker) -> list[dict[str, Any]]:
    """Outcomes of groups that went wrong, oldest first.

    Redis holds the outcomes of the last minutes, ``metrics.jsonl`` the recorded ones, if the
    run's folder is on this machine.
    """
    failed = (await asyncio.to_thread(read_run, target.run_dir)).failed
    after = "0"
    while outcomes := await broker.read_outcomes(after, _OUTCOMES_A_CALL):
        after = outcomes[-1].entry_id
        for outcome in outcomes:
            if outcome.end in FAILED_ENDS:
                failed[outcome.group_id] = {
                    "group": outcome.group_id,
                    "end": outcome.end,
                    "lengths": list(outcome.lengths),
                    "reason": outcome.reason,
                    "at_ms": outcome.at_ms,
                }
    return sorted(failed.values(), key=lambda line: int(line.get("at_ms") or 0))


def report(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Name or folder; default: the newest run.")
    ] = "",
    runs_dir: RunsDirOption = RUNS_DIR,
) -> None:
    """Write report.html of a run from its metrics, and print its summary; also while it runs.

    Example: ringasync report demo
    """
    from ringasync.observability.report import write_report

    run_dir = resolve_run_dir(run, runs_dir)
    path = write_report(run_dir)
    for line in summary_lines(read_summary(run_dir) or {}, run_dir):
        typer.echo(line)
    typer.echo(f"written: {path}")
