"""The admission gate: its limit, its liveness, and what it says."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringasync.scheduling.admission import GateSettings, GateView, admit, open_tokens

SETTINGS = GateSettings(budget_tokens=1000, max_staleness=3, group_size=8, overtaking_weight=1.0)
EMPTY = GateView(known_tokens=0, unfinished_rollouts=0, waiting_tokens=0, running=0)

tokens = st.integers(0, 20_000)
views = st.builds(
    GateView,
    known_tokens=tokens,
    unfinished_rollouts=st.integers(0, 500),
    waiting_tokens=tokens,
    running=st.integers(0, 500),
    unfinished_tokens=tokens,
    overtaken_tokens=tokens,
    unloaded_tokens=st.sampled_from([0, 0, 1, 1000, 4000]),
)
settings = st.builds(
    GateSettings,
    budget_tokens=st.integers(1, 5000),
    max_staleness=st.integers(0, 8),
    group_size=st.integers(1, 16),
    overtaking_weight=st.floats(0, 1),
    max_groups=st.integers(1, 64),
)
means = st.floats(1, 3000)


def charged(view: GateView, gate: GateSettings, mean: float) -> float:
    """The sum that the rule bounds, written down a second time."""
    open_now = view.known_tokens + view.unfinished_tokens + view.unfinished_rollouts * mean
    overtaken = max(0, view.overtaken_tokens - view.unloaded_tokens)
    return open_now + view.unloaded_tokens + gate.overtaking_weight * overtaken


@given(views, settings, means)
def test_regular_admission_never_exceeds_the_limit(
    view: GateView, gate: GateSettings, mean: float
) -> None:
    decision = admit(view, gate, mean)
    forced = decision.reason.startswith("nothing runs")
    if decision.groups and not forced:
        after = charged(view, gate, mean) + decision.groups * gate.group_size * mean
        assert after <= gate.limit_tokens * (1 + 1e-9)
    assert 0 <= decision.groups <= gate.max_groups
    assert decision.reason


@given(views, settings, means)
def test_never_closed_while_the_learner_would_wait_for_ever(
    view: GateView, gate: GateSettings, mean: float
) -> None:
    starving = dataclasses.replace(
        view,
        running=0,
        unfinished_rollouts=0,
        unloaded_tokens=0,
        waiting_tokens=min(view.waiting_tokens, gate.budget_tokens - 1),
    )
    assert admit(starving, gate, mean).groups >= 1


@given(views, settings, means)
def test_forced_admission_fills_the_budget_and_at_most_one_group_more(
    view: GateView, gate: GateSettings, mean: float
) -> None:
    decision = admit(view, gate, mean)
    if not decision.reason.startswith("nothing runs"):
        return
    assert (view.running, view.unloaded_tokens) == (0, 0)
    missing = gate.budget_tokens - view.waiting_tokens
    group = gate.group_size * mean
    assert missing > 0
    assert (decision.groups - 1) * group < missing
    assert decision.groups * group >= missing * (1 - 1e-9) or decision.groups == gate.max_groups


@given(views, settings, means, st.integers(0, 5000))
def test_more_backlog_never_admits_more(
    view: GateView, gate: GateSettings, mean: float, more: int
) -> None:
    fuller = dataclasses.replace(view, known_tokens=view.known_tokens + more)
    before, after = admit(view, gate, mean), admit(fuller, gate, mean)
    if not after.reason.startswith("nothing runs"):
        assert after.groups <= before.groups


@given(views, means)
def test_no_version_number_enters(view: GateView, mean: float) -> None:
    # Whoever adds a version to the view has to argue with the design first.
    assert not [f.name for f in dataclasses.fields(view) if "version" in f.name]
    assert open_tokens(view, mean) >= view.known_tokens


def test_an_empty_system_is_filled_to_the_limit() -> None:
    decision = admit(EMPTY, SETTINGS, 50.0)
    assert decision.groups == 4 * 1000 // (8 * 50)
    assert decision.limit_tokens == 4000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"known_tokens": 3900, "running": 5}, "full: open groups hold 3900 of 4000"),
        ({"known_tokens": 2000, "unloaded_tokens": 1900}, "load the weights"),
        ({"known_tokens": 2000, "overtaken_tokens": 1900, "running": 5}, "oldest group"),
        ({"known_tokens": 3900, "waiting_tokens": 3900}, "full"),
    ],
)
def test_a_closed_gate_says_what_it_waits_for(change: dict[str, int], words: str) -> None:
    decision = admit(dataclasses.replace(EMPTY, **change), SETTINGS, 50.0)
    assert decision.groups == 0
    assert words in decision.reason


def test_waiting_for_weights_is_not_starvation() -> None:
    view = dataclasses.replace(EMPTY, known_tokens=3900, unloaded_tokens=900)
    assert admit(view, SETTINGS, 50.0).groups == 0
    assert admit(dataclasses.replace(view, unloaded_tokens=0), SETTINGS, 50.0).groups > 0


def test_one_group_larger_than_the_limit_is_still_admitted_alone() -> None:
    assert admit(EMPTY, SETTINGS, 10_000.0).groups == 1
    busy = dataclasses.replace(EMPTY, unfinished_rollouts=8, running=8)
    assert admit(busy, SETTINGS, 10_000.0).groups == 0


@pytest.mark.parametrize(
    "wrong",
    [{"budget_tokens": 0}, {"group_size": 0}, {"max_staleness": -1}, {"overtaking_weight": 1.5}],
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="impossible gate settings"):
        dataclasses.replace(SETTINGS, **wrong)  # type: ignore[arg-type]
