"""The journal: durable, checksummed, its torn tail cut, replaced lives without effect."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.selection import Selected
from learner.journal import Journal
from learner.journal_files import decode_frame, encode_frame, list_files
from learner.record import BatchRecord, CarriedRollout, pack_carry, unpack_carry
from ringasync.broker.types import RawGroup, RawRollout
from ringasync.errors import FencedError, JournalError
from ringasync.records.segment import encode_segment, policy_segment

from .disk_kit import small_files


def rollout(rollout_id: str, tokens: int = 4) -> RawRollout:
    segment = policy_segment(0, 2, list(range(tokens)), [-1.5] * tokens)
    return RawRollout(rollout_id, 0.25, "stop", 1, (encode_segment(segment),))


def record(step: int, *, tokens: int = 4) -> BatchRecord:
    """A batch of one carried rollout and a group of two, of which one is surplus."""
    group = RawGroup(
        f"g{step}", "toy", (1, 2, 3), step, (rollout(f"g{step}.0", tokens), rollout(f"g{step}.1"))
    )
    carried = CarriedRollout("c", "toy", (9,), 77, rollout(f"c.{step}"), -0.1)
    return BatchRecord(
        batch_id=f"b{step}",
        step=step,
        fence=1,
        incarnation=1,
        round_id=0,
        policy_version=step + 1,
        budget_tokens=6,
        seed=5,
        groups=(group,),
        advantages={f"g{step}.0": 0.1, f"g{step}.1": -1 / 3},
        carried=(carried,),
        order=(Selected(f"c.{step}", "c", 4), Selected(f"g{step}.0", f"g{step}", 2, 2)),
        surplus=(f"g{step}.1",),
        ages={2: 1},
    )


def steps(directory: Path) -> list[int]:
    journal = Journal.open(directory, "run", fence=50)
    found = [one.step for _, one in journal.read()]
    journal.close()
    return found


def filled(directory: Path, count: int, *, fence: int = 1, first: int = 0) -> Journal:
    journal = Journal.open(directory, "run", fence=fence)
    for step in range(first, first + count):
        journal.append(record(step))
    return journal


def last_file(directory: Path) -> Path:
    return list_files(directory)[-1].path


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    journal = filled(tmp_path, 3)
    read = list(journal.read())
    assert [one for _, one in read] == [record(0), record(1), record(2)]
    assert [entry for entry, _ in read] == journal.entries
    assert [one.step for _, one in journal.read(journal.entries[0].end)] == [1, 2]
    assert list(journal.read(journal.end)) == []
    journal.close()
    again = Journal.open(tmp_path, "run", fence=2)
    assert [one for _, one in again.read()] == [record(0), record(1), record(2)]
    assert again.life == 2
    again.close()


def test_a_record_gives_the_batch_and_the_bookkeeping() -> None:
    one = record(3)
    batch = one.train_batch()
    assert [item.trajectory.rollout_id for item in batch.items] == ["c.3", "g3.0"]
    assert [item.trained_tokens for item in batch.items] == [4, 2]
    assert [item.advantage for item in batch.items] == [-0.1, 0.1]
    assert batch.items[1].trained_mask.tolist() == [True, True, False, False]
    assert batch.learner_step == 3
    assert [item.rollout.rollout_id for item in one.carry()] == ["g3.1"]
    assert one.carry()[0].advantage == -1 / 3
    assert [
        (t.group_id, t.trained_tokens, t.masked_tokens, t.open_trajectories)
        for t in one.trained_tokens()
    ] == [("c", 4, 0, 0), ("g3", 2, 2, 1)]
    assert unpack_carry(pack_carry(one.carry())) == one.carry()


def test_every_torn_tail_is_cut(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    journal = filled(whole, 2)
    cut_from, end = journal.entries[1].offset, journal.end
    journal.close()
    data = last_file(whole).read_bytes()
    for size in [*range(cut_from, cut_from + 30), (cut_from + end) // 2, end - 1]:
        torn = tmp_path / f"torn-{size}"
        torn.mkdir()
        (torn / last_file(whole).name).write_bytes(data[:size])
        reopened = Journal.open(torn, "run", fence=2)
        assert [entry.step for entry in reopened.entries] == [0]
        reopened.append(record(1))
        reopened.close()
        assert steps(torn) == [0, 1]


def test_a_tail_of_garbage_or_zeros_is_cut(tmp_path: Path) -> None:
    for name, tail in {"zeros": bytes(500), "noise": b"ringjnl\x01" + bytes(40)}.items():
        directory = tmp_path / name
        filled(directory, 2).close()
        path = last_file(directory)
        path.write_bytes(path.read_bytes() + tail)
        assert steps(directory) == [0, 1]


@pytest.mark.parametrize("place", [0.05, 0.3, 0.5])
def test_damage_before_the_tail_is_an_error(tmp_path: Path, place: float) -> None:
    filled(tmp_path, 4).close()
    path = last_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[int(len(data) * place) + 40] ^= 0x10
    path.write_bytes(bytes(data))
    with pytest.raises(JournalError, match="not a torn tail"):
        Journal.open(tmp_path, "run", fence=2)


def test_damage_in_an_older_life_is_an_error(tmp_path: Path) -> None:
    filled(tmp_path, 2).close()
    first = last_file(tmp_path)
    filled(tmp_path, 1, fence=2, first=2).close()
    first.write_bytes(first.read_bytes()[:-3])
    with pytest.raises(JournalError, match="damaged"):
        Journal.open(tmp_path, "run", fence=3)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    filled(tmp_path, 2).close()
    first = last_file(tmp_path)
    filled(tmp_path, 1, fence=2, first=2).close()
    first.unlink()
    with pytest.raises(JournalError, match="expected 0"):
        Journal.open(tmp_path, "run", fence=3)


def test_another_run_and_another_schema_are_refused(tmp_path: Path) -> None:
    filled(tmp_path, 1).close()
    with pytest.raises(JournalError, match="belongs to run 'run'"):
        Journal.open(tmp_path, "other", fence=2)


def test_a_replaced_learner_changes_nothing(tmp_path: Path) -> None:
    zombie = filled(tmp_path, 2)
    covered = zombie.end
    successor = Journal.open(tmp_path, "run", fence=2)
    with pytest.raises(FencedError, match="another learner"):
        zombie.append(record(2))
    zombie._file.write(encode_frame(b"written past the check"))  # type: ignore[union-attr]
    zombie.close()
    assert successor.covers(1, covered)
    assert not successor.covers(1, covered + 30)  # a checkpoint of the zombie's later life
    successor.append(record(2))
    assert successor.covers(2, successor.end)
    successor.close()
    assert steps(tmp_path) == [0, 1, 2]


def test_a_life_that_died_at_once_leaves_no_gap(tmp_path: Path) -> None:
    filled(tmp_path, 1).close()
    Journal.open(tmp_path, "run", fence=2).close()
    unborn = tmp_path / last_file(tmp_path).name.replace("000002", "000003")
    unborn.write_bytes(b"ringjnl")
    assert steps(tmp_path) == [0]


def test_rolls_over_to_new_files(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "run", fence=1, file_bytes=600)
    for step in range(6):
        journal.append(record(step))
    files = list_files(tmp_path)
    assert len(files) > 2
    middle = journal.entries[3]
    assert [one.step for _, one in journal.read(middle.offset)] == [3, 4, 5]
    journal.close()
    assert steps(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_full_disk_leaves_a_whole_journal(tmp_path: Path) -> None:
    journal = filled(tmp_path, 1)
    with small_files(journal.end + 100), pytest.raises(JournalError, match="Free disk space"):
        journal.append(record(1))
    assert last_file(tmp_path).stat().st_size == journal.end
    journal.append(record(1))
    journal.close()
    assert steps(tmp_path) == [0, 1]


@given(st.binary(max_size=200), st.integers(0, 300), st.integers(1, 255))
def test_no_flipped_byte_passes(payload: bytes, place: int, flip: int) -> None:
    frame = bytearray(encode_frame(payload))
    assert decode_frame(bytes(frame), 0) == payload
    frame[place % len(frame)] ^= flip
    assert decode_frame(bytes(frame), 0) is None
