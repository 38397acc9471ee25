"""Grading: how the last verdict decides a group, and what errors do."""

from __future__ import annotations

import math

from ringasync.broker.types import Verdict

from .kit import Kit


async def finished(kit: Kit, group_id: str, size: int, kind: str = "train") -> None:
    """A group whose rollouts are finished, with 4, 5, 6... tokens."""
    await kit.feed(group_id, size=size, kind=kind)
    await kit.session("w")
    for index, lease in enumerate(await kit.broker.take("w", size, 1)):
        assert await kit.append(lease, 0, 4 + index) == "ok"
        assert await kit.finish(lease, 4 + index) == "ok"


async def test_the_last_sibling_makes_the_group_ready(kit: Kit) -> None:
    await finished(kit, "g1", 2)
    jobs = await kit.broker.take_grading("w", 5)
    assert [(job.rollout_id, job.domain, job.task) for job in jobs] == [
        ("g1.0", "sums", {"answer": "2"}),
        ("g1.1", "sums", {"answer": "2"}),
    ]
    assert await kit.grade(jobs[:1], [0.25]) == ["ok"]
    assert await kit.group_state("g1") == "open"
    assert await kit.grade(jobs, [0.25, 1.0]) == ["duplicate", "ok"]
    (ready,) = await kit.broker.ready_groups(5)
    assert (ready.group_id, ready.num_tokens, ready.min_version) == ("g1", 9, 1)
    (outcome,) = await kit.broker.read_outcomes("0", 5)
    assert (outcome.end, outcome.rewards, outcome.lengths) == ("ready", (0.25, 1.0), (4, 5))
    samples = await kit.broker.samples(5)
    assert [(s["rollout"], s["reward"], s["text"]) for s in samples] == [
        ("g1.1", 1.0, "text"),
        ("g1.0", 0.25, "text"),
    ]
    assert await kit.check() == {"graded": 9}


async def test_exactly_equal_rewards_filter_a_group_and_others_do_not(kit: Kit) -> None:
    await finished(kit, "g1", 3)
    assert await kit.grade(await kit.broker.take_grading("w", 5), [0.9, 0.9, 0.9]) == ["ok"] * 3
    assert await kit.group_state("g1") == "filtered"
    await finished(kit, "g2", 2)
    close = [0.1 + 0.2, 0.3]
    await kit.grade(await kit.broker.take_grading("w", 5), close)
    assert await kit.group_state("g2") == "ready"
    await finished(kit, "g3", 2)
    await kit.grade(await kit.broker.take_grading("w", 5), [0.0, -0.0])
    assert await kit.group_state("g3") == "filtered"
    await finished(kit, "g4", 2)
    jobs = await kit.broker.take_grading("w", 5)
    await kit.grade(jobs, [1.0, 1.0], filter_zero_variance=False)
    assert await kit.group_state("g4") == "ready"
    assert await kit.check() == {"filtered": 15 + 9, "graded": 18}


async def test_errors_are_retried_and_then_end_the_group_as_grade_error(kit: Kit) -> None:
    await finished(kit, "g1", 2)
    good, bad = await kit.broker.take_grading("w", 2)
    assert await kit.grade([good], [1.0]) == ["ok"]
    for attempt in range(3):
        assert bad.attempts == attempt
        assert await kit.group_state("g1") == "open"
        assert await kit.grade([bad], [None]) == ["ok"]
        if attempt < 2:
            assert await kit.grade([bad], [None]) == ["duplicate"]
            (bad,) = await kit.broker.take_grading("w", 1)
    assert await kit.group_state("g1") == "grade_error"
    (outcome,) = await kit.broker.read_outcomes("0", 5)
    assert outcome.end == "grade_error"
    assert "boom" in outcome.reason
    assert await kit.check() == {"grade_error": 9}


async def test_a_reward_that_is_not_finite_is_an_error(kit: Kit) -> None:
    await finished(kit, "g1", 1)
    (job,) = await kit.broker.take_grading("w", 1)
    verdict = Verdict(job.rollout_id, job.token, math.nan)
    assert await kit.broker.grade_many("w", [verdict], 3, True, 0) == ["ok"]
    assert await kit.state("g1.0") == "finished"
    fields = await kit.broker.rollout("g1.0")
    assert fields is not None
    assert "nan" in fields["grade_error"]


async def test_a_dead_graders_jobs_return_and_its_verdict_is_refused(kit: Kit) -> None:
    await finished(kit, "g1", 1)
    await kit.session("grader", "grader")
    (job,) = await kit.broker.take_grading("grader", 1)
    counts = await kit.expire_sessions("w")
    assert counts["finished"] == 1
    assert await kit.grade([job], [1.0], "grader") == ["fenced"]
    (again,) = await kit.broker.take_grading("w", 1)
    assert again.attempts == 1
    assert await kit.grade([job], [1.0], "grader") == ["fenced"]
    assert await kit.state("g1.0") == "grading"
    assert await kit.check() == {"finished": 4}


async def test_evaluation_groups_go_to_their_own_account_under_the_pinned_version(kit: Kit) -> None:
    await kit.feed("e1", size=1, kind="eval")
    await kit.feed("g1", size=1)
    await kit.session("w")
    assert [x.rollout_id for x in await kit.broker.take("w", 1, 1)] == ["g1.0"]
    assert await kit.broker.set_pin(kit.coordinator, True) == 1
    assert (await kit.broker.heartbeat("w", 5000, {})).pin_version == 1
    assert await kit.broker.take("w", 1, 2) == []
    (lease,) = await kit.broker.take("w", 1, 1)
    assert (lease.rollout_id, lease.kind, lease.pin_version) == ("e1.0", "eval", 1)
    assert (await kit.broker.backlog()).eval_open == 1
    await kit.append(lease, 0, 7)
    await kit.finish(lease, 7)
    assert await kit.grade(await kit.broker.take_grading("w", 1), [1.0]) == ["ok"]
    assert await kit.group_state("e1") == "evaluated"
    (outcome,) = await kit.broker.read_outcomes("0", 5)
    assert (outcome.kind, outcome.end, outcome.rewards) == ("eval", "evaluated", (1.0,))
    assert await kit.broker.set_pin(kit.coordinator, False) is None
    assert (await kit.broker.backlog()).eval_open == 0
    assert await kit.check() == {"eval": 7}
