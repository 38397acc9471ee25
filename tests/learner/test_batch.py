"""The ages of a batch's tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from learner.batch import TrainBatch

VERSIONS = st.integers(min_value=0, max_value=12)


@given(ages=st.dictionaries(VERSIONS, st.integers(0, 9)), versions=st.lists(VERSIONS))
def test_ages_are_looked_up_by_version(ages: dict[int, int], versions: list[int]) -> None:
    batch = TrainBatch("b1", 4, 10, (), ages)
    found = batch.ages_of(np.array(versions, np.int32))
    assert found.dtype == np.int64
    assert found.tolist() == [ages.get(one, 0) for one in versions]
