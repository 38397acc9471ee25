"""`ringasync export` and the learner's own exports, on runs that a real learner trained."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.checkpoint import CheckpointMeta, list_checkpoints, read_meta, tensors_in
from learner.version_exports import VersionExports
from ringasync.cli.main import app
from ringasync.config.load import config_hash, load_config, resolved_json
from ringasync.config.schema import LossConfig
from ringasync.errors import CheckpointError, ConfigError, EnvironmentRefusedError, ManifestError
from ringasync.records.weights import TensorInfo
from ringasync.runtime.runfiles import RunRecord
from ringasync.weights.exports import Origin, read_origin
from ringasync.weights.manifest import VersionFields, tensor_infos

from ..conftest import RedisServer
from .backend_contract import learner_config
from .checkpoint_kit import save_checkpoint
from .kit import Feeder, LearnerProcess, tiny_model, toy_batch, write_config
from .moe_kit import tiny_moe


def export(run: str, to: Path, *options: str, runs_dir: Path) -> Result:
    """`ringasync export` in this process; what it converts is converted in another one."""
    arguments = ["export", run, "--to", str(to), "--runs-dir", str(runs_dir), *options]
    return CliRunner().invoke(app, arguments)


def refusal(result: Result) -> str:
    """The message of a deliberate error."""
    assert isinstance(result.exception, (ConfigError, CheckpointError, ManifestError)), result
    return str(result.exception)


def weights_of(folder: Path) -> list[TensorInfo]:
    """Name, shape, dtype and digest of every tensor of an HF-format folder."""
    return sorted(
        (info for path in folder.glob("*.safetensors") for info in tensor_infos(path)),
        key=lambda info: info.name,
    )


def make_run(directory: Path, model: Path, *, settings: tuple[str, ...] = ()) -> Path:
    """The folder of a run named small, as `ringasync up` leaves it before it trains."""
    file = directory / "small.toml"
    file.write_text(
        f'[run]\nname = "small"\ndir = "{directory / "runs"}"\n'
        '[[data.tasks]]\nname = "sums"\nkind = "mathematics"\n',
        encoding="utf-8",
    )
    config = load_config(file, settings)
    config.run_dir.mkdir(parents=True)
    RunRecord("small", str(file), config_hash(config), "", str(model)).write(config.run_dir)
    (config.run_dir / "config.json").write_text(resolved_json(config), encoding="utf-8")
    return config.run_dir


def save(run_dir: Path, backend: TorchBackend, step: int, *, published_step: int = -1) -> Path:
    """A checkpoint of ``backend``; version ``step + 1`` was published at ``published_step``."""
    meta = CheckpointMeta("small", step, 1, 1, 0, step + 1, 0, "{}", published_step)
    return save_checkpoint(run_dir / "checkpoints", meta, backend.state_dict(), (), keep=9)


async def test_exports_of_a_trained_run(
    run_name: str, tmp_path: Path, any_redis: RedisServer, model_dir: Path
) -> None:
    """Five steps, versions 1 to 6: each source of weights gives what was published."""
    from transformers import AutoModelForCausalLM

    file = write_config(tmp_path, run_name, model_dir)
    text = file.read_text(encoding="utf-8") + "keep_versions = 2\n"
    own = "[learner]\nexport_every_versions = 2\nkeep_exports = 2\n"
    file.write_text(text.replace("[learner]\n", own), encoding="utf-8")
    feeder = await Feeder.make(any_redis.url, file)
    await feeder.feed(14)
    learner = LearnerProcess.start(file, any_redis.url)
    assert await learner.wait() == 0, learner.log()
    await feeder.close()
    run_dir, name = feeder.config.run_dir, feeder.config.run.name
    runs_dir = run_dir.parent
    RunRecord(name, "", "", any_redis.url, str(model_dir)).write(run_dir)
    (run_dir / "config.json").write_text(resolved_json(feeder.config), encoding="utf-8")

    exports = run_dir / "exports"
    assert sorted(path.name for path in exports.iterdir()) == ["v000004", "v000006"]
    assert read_origin(exports / "v000004") == Origin(name, 4, 3)
    published = next((run_dir / "weights").glob("v000006-f?"))
    shared = (exports / "v000006" / "model.safetensors").stat()
    assert shared.st_ino == (published / "model.safetensors").stat().st_ino  # a link, no copy

    newest = tmp_path / "newest"
    done = await asyncio.to_thread(export, name, newest, runs_dir=runs_dir)
    assert done.exit_code == 0, done
    for said in ("version 6, step 5", "published version", str(newest), "MB", "vllm serve"):
        assert said in done.output
    assert weights_of(newest) == weights_of(published)
    assert (newest / "model.safetensors").stat().st_ino != shared.st_ino
    assert not (newest / "manifest.json").exists()
    assert AutoModelForCausalLM.from_pretrained(newest).config.vocab_size == 48

    kept = tmp_path / "kept"
    done = await asyncio.to_thread(export, name, kept, "--version", "4", runs_dir=runs_dir)
    assert "version 4, step 3, from export" in done.output
    assert weights_of(kept) == weights_of(exports / "v000004") != weights_of(newest)

    gone = refusal(
        await asyncio.to_thread(
            export, name, tmp_path / "gone", "--version", "1", runs_dir=runs_dir
        )
    )
    assert "version 1 are not" in gone
    assert "there: 4, 5, 6" in gone
    assert not (tmp_path / "gone").exists()

    # Without any published file the checkpoint is converted, to the same bytes.
    expected = weights_of(newest)
    shutil.rmtree(run_dir / "weights")
    shutil.rmtree(exports)
    assert read_meta(list_checkpoints(run_dir / "checkpoints")[0]).published_step == 5
    converted = tmp_path / "converted"
    done = await asyncio.to_thread(export, name, converted, "--version", "6", runs_dir=runs_dir)
    assert "version 6, step 5, from checkpoint" in done.output
    assert weights_of(converted) == expected
    assert read_origin(converted) == Origin(name, 6, 5)


@pytest.fixture
def moe_run(tmp_path: Path) -> tuple[Path, TorchBackend]:
    """A run on a tiny mixture of experts in bfloat16, one checkpoint of one step."""
    source = tmp_path / "tiny-moe"
    tiny_moe().save_pretrained(source)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (source / file).write_text(json.dumps({"of": "the start"}), encoding="utf-8")
    run_dir = make_run(tmp_path, source, settings=("model.dtype=bfloat16",))
    settings = TorchSettings(learner_config(), LossConfig(), dtype=torch.bfloat16)
    backend = TorchBackend.from_pretrained(str(source), settings)
    backend.train_batch(toy_batch())
    save(run_dir, backend, 1)
    return run_dir, backend


def test_checkpoint_of_experts_is_what_would_be_published(
    moe_run: tuple[Path, TorchBackend], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run_dir, backend = moe_run
    done = export("small", tmp_path / "out" / "deep", runs_dir=run_dir.parent)
    assert done.exit_code == 0, done
    assert "run small: step 1, from checkpoint" in done.output
    out = tmp_path / "out" / "deep"
    published = tmp_path / "published"
    backend.save_hf(published)
    assert weights_of(out) == weights_of(published)
    assert any("experts.3.gate_proj" in info.name for info in weights_of(out))
    names = {path.name for path in published.iterdir()} | {"ringasync.json"}
    assert {path.name for path in out.iterdir()} == names >= {"tokenizer.json", "config.json"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(published)(ids).logits
        assert torch.equal(loaded(ids).logits, expected)


def test_a_folder_in_use_is_kept_unless_forced(
    moe_run: tuple[Path, TorchBackend], tmp_path: Path
) -> None:
    run_dir, _ = moe_run
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious", encoding="utf-8")
    assert "--force" in refusal(export("small", out, runs_dir=run_dir.parent))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert "is a file" in refusal(export("small", out / "mine.txt", runs_dir=run_dir.parent))
    assert "holds" in refusal(export("small", run_dir, "--force", runs_dir=run_dir.parent))
    assert (run_dir / "run.json").exists()
    done = export(str(tmp_path / "small.toml"), out, "--force", runs_dir=tmp_path)
    assert done.exit_code == 0, done
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_cannot_be_exported_is_explained(tmp_path: Path, model_dir: Path) -> None:
    run_dir = make_run(tmp_path, model_dir)
    runs_dir, out = run_dir.parent, tmp_path / "out"
    assert "no run 'smal'" in refusal(export("smal", out, runs_dir=runs_dir))
    assert "nothing to export yet" in refusal(export("small", out, runs_dir=runs_dir))
    assert "there: none" in refusal(export("small", out, "--version", "3", runs_dir=runs_dir))
    other = TorchBackend(
        tiny_moe(), TorchSettings(learner_config(), LossConfig())
    )  # not what the run's starting model is
    checkpoint = save(run_dir, other, 7, published_step=6)
    assert "there: none" in refusal(export("small", out, "--version", "8", runs_dir=runs_dir))
    result = export("small", out, runs_dir=runs_dir)
    assert "was not converted: exit code 7" in refusal(result)
    assert isinstance(result.exception, CheckpointError)
    assert result.exception.exit_code == 7
    (checkpoint / "tensors" / ".metadata").unlink()
    assert "was not converted" in refusal(export("small", out, runs_dir=runs_dir))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs", "small.toml"]


def test_conversion_names_what_is_wrong(
    tmp_path: Path, model_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from learner.export import main

    run_dir = make_run(tmp_path, model_dir)
    other = TorchBackend(tiny_moe(), TorchSettings(learner_config(), LossConfig()))
    checkpoint = save(run_dir, other, 1)
    arguments = ["--model", str(model_dir), "--dtype", "float32", "--to", str(tmp_path / "to")]
    assert main([str(checkpoint), *arguments]) == 7
    assert "of another model: tensors ['model.model.layers" in capfd.readouterr().err
    assert main([str(checkpoint) + "x", *arguments]) == 7
    assert "try again" in capfd.readouterr().err


def test_a_target_that_cannot_be_written(
    moe_run: tuple[Path, TorchBackend], tmp_path: Path
) -> None:
    run_dir, _ = moe_run
    (tmp_path / "file").touch()
    result = export("small", tmp_path / "file" / "out", runs_dir=run_dir.parent)
    assert isinstance(result.exception, EnvironmentRefusedError)
    assert "cannot write" in str(result.exception)


def fields_of(version: int, fence: int = 1) -> VersionFields:
    return VersionFields("small", version, version - 1, 0, fence)


def test_exports_keep_what_they_are_told_and_sweep_leftovers(
    tmp_path: Path, model_dir: Path
) -> None:
    root = tmp_path / "exports"
    exports = VersionExports(root, every_versions=3, keep=2)
    for version in range(1, 13):
        exports.finish(exports.begin(model_dir, fields_of(version)), version)
    assert sorted(path.name for path in root.iterdir()) == ["v000009", "v000012"]
    # Killed before the version was announced, by learners of fences 1 and 3.
    assert exports.begin(model_dir, fields_of(15, fence=1)) is not None
    newer = exports.begin(model_dir, fields_of(15, fence=3))
    assert newer is not None
    exports.finish(exports.begin(model_dir, fields_of(18, fence=2)), 18)
    assert sorted(path.name for path in root.iterdir()) == [newer.name, "v000012", "v000018"]
    everything = VersionExports(tmp_path / "all", every_versions=1, keep=0)
    for version in range(1, 5):
        everything.finish(everything.begin(model_dir, fields_of(version)), version)
    assert len(list((tmp_path / "all").iterdir())) == 4
    never = VersionExports(tmp_path / "never", every_versions=0, keep=0)
    assert never.begin(model_dir, fields_of(1)) is None
    assert not (tmp_path / "never").exists()


def test_an_export_that_fails_is_logged_and_ends_nothing(tmp_path: Path, model_dir: Path) -> None:
    import structlog

    (tmp_path / "exports").touch()  # a file where the folder should be
    exports = VersionExports(tmp_path / "exports", every_versions=1, keep=0)
    with structlog.testing.capture_logs() as logs:
        assert exports.begin(model_dir, fields_of(1)) is None
    assert "not exported" in logs[0]["event"]


def test_a_tiny_model_is_not_touched_by_reading_another_checkpoint(tmp_path: Path) -> None:
    from learner.backends.tensor_files import read_model
    from learner.backends.torch_state import model_tensors

    backend = TorchBackend(tiny_model(3), TorchSettings(learner_config(), LossConfig()))
    checkpoint = save(tmp_path, backend, 1)
    other = tiny_model(4)
    read_model(tensors_in(checkpoint), {n: t.detach() for n, t in model_tensors(other).items()})
    for name, tensor in model_tensors(other).items():
        assert torch.equal(tensor, model_tensors(backend.model)[name])
    untied = tiny_model(4, tied=False)
    before = {n: t.detach().clone() for n, t in model_tensors(untied).items()}
    with pytest.raises(CheckpointError, match=r"another model: tensors \['model.lm_head"):
        read_model(
            tensors_in(checkpoint), {n: t.detach() for n, t in model_tensors(untied).items()}
        )
    assert all(torch.equal(before[n], t) for n, t in model_tensors(untied).items())
