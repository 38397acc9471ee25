"""What must hold when a simulated run has ended: in Redis, the journal, the weights, the record."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np

from learner.journal import JournalReader
from learner.record import BatchRecord
from ringasync.broker.core import text
from ringasync.records.trajectory import Trajectory
from tests.coordinator.crew import letters
from workers.engines.scripted import scripted_logprobs

from . import world
from .stand_ins import tensors_of
from .watch import require
from .world import MAX_STALENESS, RUN, Simulation

ENDS = {"trained", "filtered", "stale", "purged", "quarantined", "grade_error"}


def check(sim: Simulation) -> None:
    """All of it. Raises ``ViolationError``."""
    sim.watch.audit()
    entries = JournalReader.look(sim.config.run_dir / "journal", RUN)
    records = [record for _, record in entries.read()]
    check_groups(sim, records)
    check_tokens(sim, records)
    check_logprobs(sim, records)
    check_metrics(sim)


def check_groups(sim: Simulation, records: list[BatchRecord]) -> None:
    """Every prompt came to one end, and none is open any more."""
    server, keys = sim.wire.server, sim.keys
    live = sorted(text(member) for member in server.smembers(keys.live))
    require(not live, f"groups {live} are open after the end")
    found: dict[int, list[tuple[str, str]]] = {}
    journalled = {group.group_id: group.source_index for r in records for group in r.groups}
    for raw in server.scan_iter(keys.group("g") + "*", 1000):
        group_id = text(raw).rpartition(":")[2]
        state, index = (text(v or b"") for v in server.hmget(raw, "state", "source_index"))
        place = int(index) if index else journalled.get(group_id, -1)  # forced: no prompt is left
        found.setdefault(place, []).append((group_id, state))
    require(
        sorted(found) == list(range(world.PROMPTS)),
        f"of {world.PROMPTS} prompts these came: {found}",
    )
    twice = {index: ends for index, ends in found.items() if len(ends) != 1}
    require(not twice, f"prompts with several groups: {twice}")
    odd = {ends[0] for ends in found.values() if ends[0][1] not in ENDS}
    require(not odd, f"groups without an end: {odd}")
    for group_id in journalled:
        state = text(server.hget(keys.group(group_id), "state") or b"")
        require(state == "trained", f"{group_id} is in the journal and {state} in Redis")


def check_tokens(sim: Simulation, records: list[BatchRecord]) -> None:
    """Journal, weights and ledger agree, and nothing was trained twice."""
    trained: dict[str, int] = {}
    masked = 0
    for record in records:
        for one in record.order:
            require(one.rollout_id not in trained, f"{one.rollout_id} is journalled twice")
            trained[one.rollout_id] = one.trained_tokens
            masked += one.masked_tokens
    in_weights: Counter[str] = Counter()
    for _, rows in sim.backend.trained:
        for rollout_id in rows:
            in_weights[rollout_id] += 1
    double = [rollout_id for rollout_id, times in in_weights.items() if times > 1]
    require(not double, f"trained twice into the weights: {double}")
    order = [(r.batch_id, {o.rollout_id: o.trained_tokens for o in r.order}) for r in records]
    require(
        sim.backend.trained == order,
        f"weights hold {[b for b, _ in sim.backend.trained]}, the journal {[b for b, _ in order]}",
    )
    ledger = {text(k): int(v) for k, v in sim.wire.server.hgetall(sim.keys.ledger).items()}
    counted = (ledger.get("trained", 0), ledger.get("masked", 0))
    require(
        counted == (sum(trained.values()), masked),
        f"ledger has {counted} trained and masked, the journal {(sum(trained.values()), masked)}",
    )
    lost = ledger.get("lost", 0)
    require(
        lost <= sim.watch.lost_tokens,
        f"{lost} tokens are booked as lost, {sim.watch.lost_tokens} were",
    )


def check_logprobs(sim: Simulation, records: list[BatchRecord]) -> None:
    """Each journalled token's log-prob is that of the version beside it, and none is too old."""
    for record in records:
        carried = {one.rollout.rollout_id for one in record.carried}
        for rollout_id, one in record.credited().items():
            if rollout_id in carried:
                continue
            trajectory = one.trajectory()
            if sim.schedule.mode == "pipelined" and trajectory.num_policy_tokens:
                age = max(record.ages[int(v)] for v in np.unique(trajectory.policy_versions))
                require(age <= MAX_STALENESS, f"{rollout_id} is {age} steps old in {record.step}")
            _check_response(sim, trajectory)


def _check_response(sim: Simulation, trajectory: Trajectory) -> None:
    tokens = trajectory.token_ids.tolist()
    prompt = trajectory.prompt_ids.tolist()
    index = int(trajectory.group_id[1:7])
    require(prompt == letters(f"train {index}"), f"{trajectory.group_id} has another prompt")
    for i, token in enumerate(tokens):
        version = int(trajectory.policy_versions[i])
        require(version in sim.watch.versions, f"{trajectory.rollout_id}: version {version}?")
        tensors = tensors_of(sim.watch.versions[version][1])
        expected = float(scripted_logprobs(tensors, [*prompt, *tokens[:i]], 1.0)[token])
        found = float(trajectory.behavior_logprobs[i])
        require(
            abs(found - expected) < 1e-6,
            f"{trajectory.rollout_id}: token {i} has log-prob {found}, version {version} gives "
            f"{expected}",
        )


def check_metrics(sim: Simulation) -> None:
    """The run's record holds each stream entry once and says how every group ended."""
    path = sim.config.run_dir / "metrics.jsonl"
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    ids = Counter((line["stream"], line["id"]) for line in lines if "stream" in line)
    twice = [entry for entry, times in ids.items() if times > 1]
    require(not twice, f"recorded twice: {twice}")
    if sim.watch.rollbacks:
        return  # an outcome may be lost with Redis' tail; the groups above are what counts
    # A coordinator killed before its first cursor was stored counts as a life: g000000r1.
    ended = {line["group"].partition("r")[0] for line in lines if line.get("kind") == "outcome"}
    missing = [f"g{i:06d}" for i in range(world.PROMPTS) if f"g{i:06d}" not in ended]
    require(not missing, f"no outcome is recorded of {missing}")
