"""Where a run's figures go beside metrics.jsonl, as real files of TensorBoard and W&B."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ringasync.config.schema import Config
from ringasync.coordinator.extras import module_of_extra
from ringasync.coordinator.scalars import numbers, open_writers
from ringasync.errors import EnvironmentRefusedError

ROOT = Path(__file__).parents[2]
LINE = {"step": 3, "loss": 0.5, "by": {"a": 1}, "name": "x", "ok": True}


def config_of(folder: Path, **observability: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "small", "dir": str(folder)},
            "data": {"tasks": [{"name": "sums", "kind": "mathematics"}]},
            "observability": {"tensorboard": False, **observability},
        }
    )


def test_tensorboard_gets_an_event_file(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    [writer] = open_writers(config_of(tmp_path, tensorboard=True), 7)
    writer.add("train", LINE, 3, 9.0)
    writer.flush()
    writer.close()
    [file] = (tmp_path / "small" / "tensorboard").iterdir()
    found = {
        value.tag: (event.step, value.tensor.float_val[0] if value.tensor.float_val else 0.0)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert found == {"train/loss": (3, 0.5), "train/by.a": (3, 1.0)}


def test_numbers_leaves_out_what_is_none() -> None:
    assert numbers({"step": 1, "a": 2, "b": None, "c": {"d": 1.5, "e": "x"}}) == [
        ("a", 2.0),
        ("c.d", 1.5),
    ]


def test_switched_off_writes_nothing_and_loads_nothing(tmp_path: Path) -> None:
    assert open_writers(config_of(tmp_path), 7) == []
    assert not (tmp_path / "small").exists()
    # Of OpenTelemetry redis-py loads the part for metrics by itself, where that is installed.
    names = ("wandb", "tensorboard", "opentelemetry.exporter", "ringasync.observability.otlp")
    code = f"import sys, ringasync.coordinator.app; print(sorted({{*{names}}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_setting_whose_packages_are_missing_is_refused_with_the_extra() -> None:
    with pytest.raises(EnvironmentRefusedError) as refused:
        module_of_extra("ringasync.no_such_module", "wandb", "observability.wandb")
    assert "observability.wandb is set" in str(refused.value)
    assert "pip install 'ringasync[wandb]'" in str(refused.value)


def test_wandb_gets_a_run_that_a_second_life_goes_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from ringasync.coordinator import wandb_scalars

    monkeypatch.setattr(wandb_scalars, "CLOSE_TIMEOUT_S", 100.0)  # a busy machine is no network
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_of(tmp_path, wandb="our-project")
    config.run_dir.mkdir()
    for life in (1, 2):
        [writer] = open_writers(config, 1234)
        writer.add("train", {**LINE, "step": life}, life, 9.0)
        writer.add("run", {"ledger": {"open": 10 * life}}, life, 9.0)
        writer.close()
    files = sorted((config.run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert [file.name for file in files] == ["run-small-1234.wandb"] * 2
    for life, file in enumerate(files, 1):
        records = whole_records(file)
        [run] = [record.run for record in records if record.HasField("run")]
        assert (run.project, run.display_name, run.run_id) == ("our-project", "small", "small-1234")
        sent = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert sent["schedule"]["group_size"] == 8
        assert not run.host
        rows = [row_of(record.history) for record in records if record.HasField("history")]
        own = [{k: v for k, v in row.items() if not k.startswith("_")} for row in rows]
        assert own == [
            {"train/loss": 0.5, "train/by.a": 1.0, "train/step": life},
            {"run/ledger.open": 10 * life, "run/step": life},
        ]
        kinds = {record.WhichOneof("record_type") for record in records}
        assert not kinds & {"output", "output_raw", "stats"}


def row_of(history: Any) -> dict[str, Any]:
    return {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item
    }


def whole_records(path: Path, deadline_s: float = 60.0) -> list[Any]:
    """All records, once the last is there: wandb's own process writes them."""
    ends_s = time.monotonic() + deadline_s
    while True:
        records = list(records_of(path))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < ends_s, f"{path} has no end"
        time.sleep(0.05)


def records_of(path: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file: protobufs in LevelDB's log format, pieces in 32 KiB blocks."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            return
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # full, or the last piece
            yield Record.FromString(whole)
            whole = b""
