"""What must hold of a run that has ended, whatever was done to it.

``check`` reads the run's folder and its Redis and gives one sentence for each thing that does not
hold. ``tests/chaos/test_oracle.py`` spoils a finished run in each way and sees each found.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.journal import JournalReader
from learner.record import BatchRecord
from ringasync.broker.client import Broker
from ringasync.broker.core import text
from ringasync.broker.types import AuditReport
from ringasync.coordinator.metrics_file import METRICS_FILE, read_lines
from ringasync.coordinator.prompts import group_id
from ringasync.coordinator.summary import SUMMARY_FILE
from ringasync.errors import RingError
from ringasync.records.states import Phase
from ringasync.runtime.replay import replay_command

from .losses import BOUND_TOKENS, Loss

ENDS_WITH_REASON = {"stale", "purged", "quarantined", "grade_error", "lost"}
ENDS = {"trained", "filtered", *ENDS_WITH_REASON}


@dataclass(frozen=True)
class Finished:
    """A run that has ended, read once."""

    run_dir: Path
    prompts: int
    phase: str
    audit: AuditReport
    live: tuple[str, ...]
    records: tuple[BatchRecord, ...]
    lines: tuple[dict[str, Any], ...]
    losses: tuple[Loss, ...] = ()

    @classmethod
    async def read(
        cls, run_dir: Path, url: str, prompts: int, losses: Iterable[Loss] = ()
    ) -> Finished:
        """From the folder and from Redis, which must be up at ``url``."""
        broker = await Broker.connect(url, run_dir.name)
        try:
            meta, audit = await broker.run_meta(), await broker.audit()
            live = await broker.client.smembers(broker.keys.live)
        finally:
            await broker.close()
        journal = JournalReader.look(run_dir / "journal", run_dir.name)
        return cls(
            run_dir,
            prompts,
            meta.get("phase", ""),
            audit,
            tuple(sorted(text(raw) for raw in live)),
            tuple(record for _, record in journal.read()),
            tuple(read_lines(run_dir / METRICS_FILE)),
            tuple(losses),
        )


def check(run: Finished) -> list[str]:
    """Everything but the replay, which takes a learner's start."""
    return [
        *check_end(run),
        *check_groups(run),
        *check_tokens(run),
        *check_ledger(run),
        *check_regenerated(run),
    ]


def check_end(run: Finished) -> list[str]:
    """The run is done and says so."""
    problems = []
    if run.phase != Phase.DONE:
        problems.append(f"the run is {run.phase or 'unknown'}, not done")
    if not (run.run_dir / SUMMARY_FILE).exists():
        problems.append("there is no summary")
    elif json.loads((run.run_dir / SUMMARY_FILE).read_text())["steps"] != len(run.records):
        problems.append("summary and journal disagree about the number of steps")
    if [record.step for record in run.records] != list(range(len(run.records))):
        problems.append(f"journalled steps {[record.step for record in run.records]}")
    if run.live:
        problems.append(f"groups {list(run.live[:5])} ({len(run.live)}) are open after the end")
    return problems


def check_groups(run: Finished) -> list[str]:
    """Every prompt came to one end that is known, with a reason where one is due, once recorded."""
    problems = []
    outcomes = [line for line in run.lines if line.get("kind") == "outcome"]
    # An entry's id is a millisecond, so entries of two streams may well have the same.
    ids = Counter((line["stream"], line["id"]) for line in run.lines if "stream" in line)
    twice = [" ".join(entry) for entry, times in ids.items() if times > 1]
    if twice:
        problems.append(f"metrics.jsonl holds {twice[:5]} more than once")
    ends: dict[str, list[dict[str, Any]]] = {}
    for line in outcomes:
        if line["group_kind"] == "train" and not line.get("rollout"):
            ends.setdefault(line["group"], []).append(line)
    trained = Counter(group.group_id for record in run.records for group in record.groups)
    for index in range(run.prompts):
        group = group_id(index)
        found = [line for line in ends.get(group, []) if line["end"] != "ready"]
        known = [line["end"] for line in found] + ["trained"] * trained[group]
        if len(known) != 1 or known[0] not in ENDS:
            problems.append(f"group {group} ended {known or 'nowhere'}")
        elif known[0] in ENDS_WITH_REASON and not found[0]["reason"]:
            problems.append(f"group {group} is {known[0]} without a reason")
    strange = sorted({*ends, *trained} - {group_id(index) for index in range(run.prompts)})
    if strange:
        problems.append(f"groups {strange[:5]} belong to no prompt")
    return problems


def check_tokens(run: Finished) -> list[str]:
    """No rollout is in two batches, and each as many tokens as it has."""
    problems = []
    times = Counter(one.rollout_id for record in run.records for one in record.order)
    twice = sorted(rollout for rollout, count in times.items() if count > 1)
    if twice:
        problems.append(f"rollouts trained twice: {twice[:5]} ({len(twice)})")
    for record in run.records:
        credited = record.credited()
        for one in record.order:
            if one.rollout_id not in credited:
                problems.append(f"{one.rollout_id} was trained without tokens in the journal")
                continue
            has = credited[one.rollout_id].trajectory().num_policy_tokens
            if one.trained_tokens + one.masked_tokens != has:
                problems.append(
                    f"{one.rollout_id} has {has} tokens, {one.trained_tokens} trained and "
                    f"{one.masked_tokens} masked"
                )
    return problems


def check_ledger(run: Finished) -> list[str]:
    """Counters agree with the records, with each other, with the journal and with the summary."""
    problems = []
    if not run.audit.balanced:
        problems.append(f"ledger: {run.audit.differences} {list(run.audit.problems[:5])}")
    counters = run.audit.counters
    order = [one for record in run.records for one in record.order]
    journalled = {
        "trained": sum(one.trained_tokens for one in order),
        "masked": sum(one.masked_tokens for one in order),
    }
    for account, tokens in journalled.items():
        if counters[account] != tokens:
            problems.append(f"ledger has {counters[account]} {account}, the journal {tokens}")
    still = {name: counters[name] for name in ("open", "finished", "graded", "taken")}
    if any(still.values()):
        problems.append(f"tokens in accounts of a living run: {still}")
    return problems


def check_regenerated(run: Finished) -> list[str]:
    """A fault costs no rollout more tokens than two flushes."""
    return [
        f"fault {loss.fault}: {loss.tokens} tokens of {loss.rollout} were lost, "
        f"{BOUND_TOKENS} may be"
        for loss in run.losses
        if loss.tokens > BOUND_TOKENS
    ]


def check_replay(run_dir: Path) -> list[str]:
    """``ringasync replay``: the journal, trained again, gives the losses that were recorded."""
    command = replay_command(run_dir, (), from_version=None, steps=None, label="oracle", model="")
    done = subprocess.run(
        [*command], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        return [
            f"replay ended with exit code {done.returncode}: {(done.stdout + done.stderr)[-800:]}"
        ]
    summary = json.loads((run_dir / "replay" / "oracle" / "summary.json").read_text())
    journal = JournalReader.look(run_dir / "journal", run_dir.name)
    problems = []
    if summary["steps"] != len(journal.entries):
        problems.append(f"replay trained {summary['steps']} of {len(journal.entries)} steps")
    if not summary["losses_agree"]:
        problems.append(f"replay: losses differ at step {summary['first_differing_step']}")
    return problems


def steps_without_loss(run: Finished) -> list[int]:
    """Journalled steps of which no line was recorded: a metric may die with its learner."""
    known = {line["step"] for line in run.lines if line.get("kind") == "step"}
    return sorted({record.step + 1 for record in run.records} - known)


__all__ = ["Finished", "RingError", "check", "check_replay", "steps_without_loss", "sys"]
