"""Weights leave several ranks tensor by tensor: what rank 0 holds meanwhile, and what it writes."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, WeightConverter

from learner.backends import export
from learner.backends.export import export_hf
from learner.backends.exporter import WeightExporter
from learner.backends.sharding import placements

from .kit import tiny_model
from .ranks_kit import TwoRanks, build, spec_of, two_ranks

SHARD_BYTES = 10_000


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    with two_ranks(tmp_path_factory.mktemp("gathering")) as made:
        yield made


def storages() -> dict[int, int]:
    """Bytes of the memory of every tensor that the collector watches, by address."""
    found = {}
    for one in gc.get_objects():
        if type(one) in (Tensor, torch.nn.Parameter) and one.device.type == "cpu":
            memory = one.untyped_storage()
            # Those that a compiler left behind in this process have sizes only.
            with suppress(RuntimeError):
                found[memory.data_ptr()] = memory.nbytes()
    return found


class Held:
    """The most memory of tensors that were not there before, at every gather and every write."""

    def __init__(self) -> None:
        self.peak_bytes = self.gathers = 0

    def look(self, before: Mapping[int, int]) -> None:
        new = {at: size for at, size in storages().items() if at not in before}
        self.peak_bytes = max(self.peak_bytes, sum(new.values()))


@contextmanager
def watched(shard_bytes: int) -> Iterator[Held]:
    """What a save within it holds, with files of ``shard_bytes``."""
    held, gather, before = Held(), DTensor.full_tensor, storages()
    receive = WeightExporter._gather

    def gathering(tensor: DTensor, *arguments: Any) -> Tensor:
        value: Tensor = gather(tensor, *arguments)
        held.gathers += 1
        held.look(before)
        return value

    def receiving(*arguments: Any) -> Tensor:
        value = receive(*arguments)
        held.gathers += 1
        held.look(before)
        return value

    def saving(*arguments: Any, **more: Any) -> None:
        held.look(before)
        save_file(*arguments, **more)

    gc.freeze()  # what is there already need not be looked through each time
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DTensor, "full_tensor", gathering)
            patch.setattr(WeightExporter, "_gather", receiving)
            patch.setattr("learner.backends.export.save_file", saving)
            patch.setattr(export, "SHARD_BYTES", shard_bytes)
            yield held
    finally:
        gc.unfreeze()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


@pytest.mark.parametrize(
    ("model", "dtype"), [("untied", "float32"), ("tied", "bfloat16"), ("moe", "bfloat16")]
)
def test_rank_0_never_holds_more_than_a_file_and_a_tensor(
    model: str, dtype: str, ranks: TwoRanks, tmp_path: Path
) -> None:
    spec = spec_of(model=model, dtype=dtype)
    both = ranks.make(spec)
    build(spec).save_hf(tmp_path / "alone")
    expected = load_file(tmp_path / "alone" / "model.safetensors")
    total = sum(one.nbytes for one in expected.values())
    width = 4 if dtype == "float32" else 2
    largest = max(one.numel() for one in both.local.model.parameters()) * width

    with watched(1 << 30) as held:
        both.save_hf(tmp_path / "one-file")
    assert held.peak_bytes >= total  # the count sees what is there
    with watched(SHARD_BYTES) as held:
        both.save_hf(tmp_path / "files")
    assert held.gathers == len(export.exported_tensors(both.local.model))
    # A file, and a parameter: gathered, its parts by experts, and this rank's shard of it, cast.
    assert held.peak_bytes <= SHARD_BYTES + 3 * largest < total

    found = tensors_of(tmp_path / "files")
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())
    files = sorted((tmp_path / "files").glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == expected.keys()
    assert {*index["weight_map"].values()} == {path.name for path in files}
    texts = [(tmp_path / name / "config.json").read_text() for name in ("files", "alone")]
    assert texts[0] == texts[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "files", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", dtype=torch.float32)
    for (name, one), (_, other) in zip(
        loaded.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("model", "dtype"), [("untied", "float32"), ("tied", "bfloat16")])
def test_beside_the_training_rank_0_holds_its_shards_a_file_and_a_tensor(
    model: str, dtype: str, ranks: TwoRanks, tmp_path: Path
) -> None:
    both = ranks.make(spec_of(model=model, dtype=dtype))
    parameters = placements(both.local.model).values()
    width = 4 if dtype == "float32" else 2
    shards = sum(one.to_local().numel() for one in parameters) * width
    total = sum(one.numel() for one in parameters) * width
    largest = max(one.numel() for one in parameters) * width
    with watched(SHARD_BYTES) as held:
        both.begin_export(tmp_path / "files").result()
    assert held.gathers == len(parameters)
    assert shards <= held.peak_bytes <= shards + SHARD_BYTES + 2 * largest < total + shards
    both.save_hf(tmp_path / "waited")
    expected, found = (tensors_of(tmp_path / name) for name in ("waited", "files"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(one, expected[name]) for name, one in found.items())


def test_the_files_are_those_that_transformers_writes(tmp_path: Path) -> None:
    for index, model in enumerate((tiny_model(), tiny_model(tied=False))):
        ours, theirs = tmp_path / f"ours-{index}", tmp_path / f"theirs-{index}"
        ours.mkdir()
        export_hf(model, ours, dtype=torch.float32, source="")
        model.save_pretrained(theirs)  # type: ignore[operator]
        assert {one.name for one in ours.iterdir()} == {one.name for one in theirs.iterdir()}
        found, expected = tensors_of(ours), tensors_of(theirs)
        assert found.keys() == expected.keys()
        assert all(torch.equal(one, expected[name]) for name, one in found.items())
        configs = [json.loads((one / "config.json").read_text()) for one in (ours, theirs)]
        assert configs[0] == configs[1]


def test_a_tensor_of_several_parameters_waits_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model()
    model._weight_conversions = [  # as a checkpoint of Phi-3 has them in one
        WeightConverter(
            "mlp.gate_up_proj.weight",
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            operations=[Chunk(dim=0)],
        )
    ]
    monkeypatch.setattr(export, "SHARD_BYTES", SHARD_BYTES)
    export_hf(model, tmp_path, dtype=torch.float32, source="")
    found = tensors_of(tmp_path)
    assert not [name for name in found if ".gate_proj." in name or ".up_proj." in name]
    for layer in range(2):
        mlp = model.model.layers[layer].mlp
        fused = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate_up_proj.weight"], fused)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
