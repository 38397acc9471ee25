"""The oracle itself: a finished run is spoiled in each way, and each is found."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import redis

from learner.journal import Journal
from ringasync.broker.embedded import EmbeddedRedis
from ringasync.broker.keys import Keys

from .campaign import read_finished
from .losses import BOUND_TOKENS, Loss, sampled_tokens
from .oracle import Finished, check, check_replay, steps_without_loss
from .stage import RUN, Stage

PROMPTS = 24
KEYS = Keys(RUN)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@dataclass
class Ended:
    """A copy of the finished run, to be spoiled."""

    run_dir: Path

    def problems(self, *losses: Loss) -> list[str]:
        return check(self.read(*losses))

    def read(self, *losses: Loss) -> Finished:
        return read_finished(self.run_dir, PROMPTS, losses)

    def in_redis(self, change: Callable[[redis.Redis], object]) -> None:
        server = EmbeddedRedis(self.run_dir / "redis")
        with redis.Redis.from_url(server.start_blocking()) as client:
            change(client)
        server.stop_blocking()

    def lines(self, change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
        path = self.run_dir / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))


@pytest.fixture(scope="module")
def finished_run(chaos_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that was left alone."""
    folder = tmp_path_factory.mktemp("run")
    stage = Stage(folder / "stage", chaos_model, 0, PROMPTS)
    try:
        stage.start()
        deadline = time.monotonic() + 200
        while stage.exit_code() is None:
            assert time.monotonic() < deadline, stage.tail()
            time.sleep(0.2)
        assert stage.exit_code() == 0, stage.tail()
        yield shutil.copytree(stage.run_dir, folder / RUN)  # the disks' contents, not their links
    finally:
        stage.close()


@pytest.fixture
def ended(finished_run: Path, tmp_path: Path) -> Ended:
    """A copy of it."""
    return Ended(shutil.copytree(finished_run, tmp_path / RUN))


def test_a_run_that_was_left_alone_is_found_whole(ended: Ended) -> None:
    assert ended.problems() == []
    assert steps_without_loss(ended.read()) == []
    assert check_replay(ended.run_dir) == []


def journal_again(ended: Ended) -> None:
    """Put the first batch at the journal's end once more, as a learner would a new one."""
    journal = Journal.open(ended.run_dir / "journal", RUN, fence=10**15)
    records = [record for _, record in journal.read()]
    journal.append(replace(records[0], batch_id="again", step=len(records), fence=10**15))
    journal.close()


def test_a_group_trained_twice_is_found(ended: Ended) -> None:
    journal_again(ended)
    problems = ended.problems()
    assert any("rollouts trained twice" in problem for problem in problems)
    assert any("ended ['trained', 'trained']" in problem for problem in problems)
    assert any("the journal" in problem for problem in problems)


def test_an_outcome_that_is_missing_is_found(ended: Ended) -> None:
    first = {"kind": "outcome", "group_kind": "train", "end": "filtered"}
    trained = {group.group_id for record in ended.read().records for group in record.groups}
    victim = sorted(trained)[0]
    # Recorded as filtered and trained all the same; then nothing recorded but "ready", untrained.
    ended.lines(lambda lines: [*lines, {**first, "group": victim, "reason": ""}])
    assert f"group {victim} ended ['filtered', 'trained']" in ended.problems()


def test_a_group_that_was_only_ready_is_found(ended: Ended) -> None:
    run = ended.read()
    # The last batch may be made of what others carried over, and end no group.
    victim = [record for record in run.records if record.groups][-1]
    others = tuple(record for record in run.records if record is not victim)
    problems = check(replace(run, records=others))
    lost = [group.group_id for group in victim.groups]
    assert all(f"group {group} ended nowhere" in problems for group in lost)


@pytest.mark.parametrize("end", ["stale", "purged", "quarantined", "grade_error", "lost"])
def test_an_end_without_a_reason_is_found(ended: Ended, end: str) -> None:
    run = ended.read()
    line = {"kind": "outcome", "group_kind": "train", "group": "g000000", "end": end, "reason": ""}
    ready = {**line, "end": "ready"}
    others = [one for one in run.lines if one.get("group") != "g000000"]
    without = tuple(
        replace(record, groups=tuple(g for g in record.groups if g.group_id != "g000000"))
        for record in run.records
    )
    spoiled = replace(run, lines=(*others, ready, line), records=without)
    problems = check(spoiled)
    assert f"group g000000 is {end} without a reason" in problems
    assert "g000000.0 was trained without tokens in the journal" in problems
    known = replace(spoiled, lines=(*others, ready, {**line, "reason": "told"}))
    assert not [problem for problem in check(known) if problem.startswith("group")]


def test_an_end_recorded_twice_is_found(ended: Ended) -> None:
    def again(lines: list[dict[str, object]]) -> list[dict[str, object]]:
        return [*lines, next(line for line in lines if line["kind"] == "outcome")]

    ended.lines(again)
    assert any("more than once" in problem for problem in ended.problems())


def test_entries_of_two_streams_may_have_the_same_id(ended: Ended) -> None:
    def alike(lines: list[dict[str, object]]) -> list[dict[str, object]]:
        outcome = next(line for line in lines if line.get("stream") == "outcomes")
        metric = next(line for line in lines if line.get("stream") == "metrics")
        metric["id"] = outcome["id"]
        return lines

    ended.lines(alike)
    assert not any("more than once" in problem for problem in ended.problems())


def test_a_group_of_no_prompt_is_found(ended: Ended) -> None:
    problems = check(replace(ended.read(), prompts=PROMPTS - 1))
    assert f"groups ['g{PROMPTS - 1:06d}'] belong to no prompt" in problems
    assert "group g000024 ended nowhere" in check(replace(ended.read(), prompts=PROMPTS + 1))


def test_a_counter_that_is_off_is_found(ended: Ended) -> None:
    ended.in_redis(lambda client: client.hincrby(KEYS.ledger, "trained", 1))
    problems = ended.problems()
    assert any(problem.startswith("ledger: {'accepted': 1}") for problem in problems)
    assert any("ledger has" in problem for problem in problems)


def test_counters_that_are_off_together_are_found(ended: Ended) -> None:
    def move(client: redis.Redis) -> None:
        client.hincrby(KEYS.ledger, "trained", -2)
        client.hincrby(KEYS.ledger, "masked", 2)

    ended.in_redis(move)
    problems = ended.problems()
    assert [problem for problem in problems if problem.startswith("ledger has")] == problems
    assert len(problems) == 2


def test_a_rollout_whose_account_is_lost_is_found(ended: Ended) -> None:
    def revive(client: redis.Redis) -> None:
        client.sadd(KEYS.live, "g000001")

    ended.in_redis(revive)
    problems = ended.problems()
    assert any("are open after the end" in problem for problem in problems)
    assert any("live group g000001 is trained" in problem for problem in problems)


def test_a_run_that_is_not_done_is_found(ended: Ended) -> None:
    ended.in_redis(lambda client: client.hset(KEYS.meta, "phase", "finishing"))
    (ended.run_dir / "summary.json").unlink()
    assert ended.problems() == ["the run is finishing, not done", "there is no summary"]


def test_tokens_that_are_neither_trained_nor_masked_are_found(ended: Ended) -> None:
    run = ended.read()
    first = run.records[0]
    short = replace(first.order[0], trained_tokens=first.order[0].trained_tokens - 1)
    spoiled = replace(first, order=(short, *first.order[1:]))
    problems = check(replace(run, records=(spoiled, *run.records[1:])))
    assert any(problem.startswith(short.rollout_id) for problem in problems)


def test_a_loss_that_changed_is_found(ended: Ended) -> None:
    def change(lines: list[dict[str, object]]) -> list[dict[str, object]]:
        steps = [line for line in lines if line["kind"] == "step"]
        loss = steps[-1]["loss"]
        assert isinstance(loss, float)
        steps[-1]["loss"] = loss * (1 + 1e-9) or 1e-9
        return lines

    ended.lines(change)
    (problem,) = check_replay(ended.run_dir)
    assert "replay ended with exit code 1" in problem


def test_a_fault_that_cost_too_many_tokens_is_found(ended: Ended) -> None:
    near = Loss(7, "g000001.0", BOUND_TOKENS, 100, 1.0)
    far = replace(near, fault=8, tokens=BOUND_TOKENS + 1)
    assert ended.problems(near) == []
    assert ended.problems(near, far) == [
        f"fault 8: {BOUND_TOKENS + 1} tokens of g000001.0 were lost, {BOUND_TOKENS} may be"
    ]


def test_sampled_tokens_are_those_of_the_present_lease() -> None:
    trace = ["100 a 30 1", "200 b 90 1", "300 a 11 2", "310 a 12 2"]
    assert sampled_tokens(trace, "a", 250) == 12
    assert sampled_tokens(trace, "a", 50) == 30
    assert sampled_tokens(trace, "c", 0) == 0
