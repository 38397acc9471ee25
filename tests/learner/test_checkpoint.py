"""Checkpoints: exact, atomic, the newest usable one on the journal's chain."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from learner.checkpoint import CheckpointMeta, list_checkpoints, load_latest, tensors_in
from learner.record import CarriedRollout
from ringasync import SCHEMA_VERSION
from ringasync.errors import CheckpointError

from .checkpoint_kit import Loaded, load_checkpoint, restore, save_checkpoint, snapshot
from .disk_kit import small_files
from .kit import tiny_backend, toy_batch
from .test_journal import rollout

META = CheckpointMeta(
    run="run",
    step=20,
    fence=3,
    life=2,
    journal_offset=4711,
    policy_version=21,
    last_round_id=0,
    data_position='{"low":5,"runs":[]}',
)
CARRY = (CarriedRollout("g", "toy", (1, 2), 4, rollout("g.1"), 1 / 3),)


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((3, 2), value),
        "optim.w.step": torch.tensor(7.0),
        "train.updates": torch.tensor(7),
        "rng.torch": torch.arange(9, dtype=torch.uint8),
        "model.b": torch.full((2,), value, dtype=torch.bfloat16),
    }


def save(directory: Path, step: int, *, life: int = 2, keep: int = 9) -> Path:
    meta = replace(META, step=step, life=life, journal_offset=step * 100)
    return save_checkpoint(directory, meta, tensors(step), CARRY, keep=keep)


def load(directory: Path, accept: object = None) -> tuple[Loaded | None, list[str]]:
    return load_checkpoint(directory, "run", accept)


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, META, tensors(), CARRY, keep=2)
    assert path.name == "step00000020-f000003-l000002"
    found, warnings = load(tmp_path)
    assert found is not None
    assert warnings == []
    assert found.meta == META
    assert found.carry == CARRY
    assert found.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_a_backend_goes_on_exactly(tmp_path: Path) -> None:
    one = tiny_backend()
    one.train_batch(toy_batch())
    save_checkpoint(tmp_path, META, one.state_dict(), (), keep=2)
    other = tiny_backend(seed=5)
    found, _ = load(tmp_path)
    assert found is not None
    restore(other, found.tensors)
    first, second = one.train_batch(toy_batch(step=1)), other.train_batch(toy_batch(step=1))
    assert (first.loss, first.grad_norm) == (second.loss, second.grad_norm)
    state = other.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_keeps_the_newest_and_sweeps_leftovers(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step00000001-f000003-l000001-abc").mkdir(parents=True)
    successors = tmp_path / ".tmp-step00000001-f000004-l000003-abc"
    successors.mkdir()
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert [path.name[:12] for path in list_checkpoints(tmp_path)] == [
        "step00000030",
        "step00000020",
    ]
    assert [path.name for path in tmp_path.glob(".tmp-*")] == [successors.name]


def test_a_later_life_wins_over_a_later_step(tmp_path: Path) -> None:
    save(tmp_path, 40, life=1)
    save(tmp_path, 30, life=2)
    found, _ = load(tmp_path)
    assert found is not None
    assert found.meta.step == 30


def test_a_replaced_learners_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    found, warnings = load(tmp_path, lambda meta: meta.journal_offset <= 1500)
    assert found is not None
    assert found.meta.step == 10
    assert "replaced" in warnings[0]


@pytest.mark.parametrize("victim", ["meta.json", "carry.msgpack", "tensors/.metadata"])
@pytest.mark.parametrize("damage", ["gone", "garbage"])
def test_falls_back_to_the_one_before(tmp_path: Path, victim: str, damage: str) -> None:
    save(tmp_path, 10)
    broken = save(tmp_path, 20) / victim
    if damage == "gone":
        broken.unlink()
    else:
        broken.write_bytes(b"\x80garbage")
    found, warnings = load(tmp_path)
    assert found is not None
    assert found.meta.step == 10
    assert "step00000020" in warnings[0]


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "a foreign file"])
def test_damaged_tensors_are_seen_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    (data,) = tensors_in(path).glob("*.distcp")
    content = bytearray(data.read_bytes())
    if damage == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif damage == "a flipped bit":
        place = content.index(tensors(20)["model.w"].numpy().tobytes())
        content[place] ^= 1  # torch would load it as another weight
        data.write_bytes(content)
    else:
        (tensors_in(path) / "__1_0.distcp").touch()
    found, warnings = load(tmp_path)
    assert found is not None
    assert found.meta.step == 10
    assert "damaged or foreign" in warnings[0]


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10)
    whole = save(tmp_path, 20)
    whole.rename(tmp_path / f".tmp-{whole.name}-abc")
    found, warnings = load(tmp_path)
    assert found is not None
    assert (found.meta.step, warnings) == (10, [])


def test_another_models_and_another_schemas_checkpoint_change_nothing(tmp_path: Path) -> None:
    backend = tiny_backend()
    one = save(tmp_path, 10)  # its tensors are of no Qwen3
    other = save(tmp_path, 20)
    meta = other / "meta.json"
    meta.write_text(meta.read_text().replace(f'"schema": {SCHEMA_VERSION}', '"schema": 99'))
    before = snapshot(backend)
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match=r"another schema.*of another model"):
        load_latest(
            tmp_path, "run", accept=lambda _: True, warn=warnings.append, restore=backend.load
        )
    assert [one.name in text for text in warnings] == [False, True]
    after = snapshot(backend)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoints_without_checksums_of_tensors_still_load(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    fields = json.loads((path / "meta.json").read_text())
    del fields["tensors_xxh3"]  # as 0.1 wrote them
    (path / "meta.json").write_text(json.dumps(fields))
    found, warnings = load(tmp_path)
    assert found is not None
    assert (found.meta.step, warnings) == (10, [])


def test_missing_tensor_file_is_seen(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    for data in (path / "tensors").glob("*.distcp"):
        data.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint can be used"):
        load(tmp_path)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, replace(META, run="other"), tensors(), (), keep=1)
    with pytest.raises(CheckpointError, match="belongs to run 'other'"):
        load(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    assert load(tmp_path / "absent") == (None, [])


def test_a_full_disk_leaves_the_older_one(tmp_path: Path) -> None:
    save(tmp_path, 10)
    with (
        small_files(200),
        pytest.raises(CheckpointError, match=r"Free disk space|cannot be written"),
    ):
        save(tmp_path, 20)
    found, warnings = load(tmp_path)
    assert found is not None
    assert (found.meta.step, warnings) == (10, [])
    assert list(tmp_path.glob(".tmp-*")) == []
