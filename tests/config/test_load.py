"""Loading a configuration: what is accepted, and how everything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from ringasync.config.keys import known_keys, nearest_keys
from ringasync.config.load import (
    MAX_CONFIG_BYTES,
    config_from_json,
    config_hash,
    load_config,
    resolved_json,
    resolved_toml,
)
from ringasync.config.schema import Config
from ringasync.errors import ConfigError

SMALLEST = """
[[data.tasks]]
name = "sums"
kind = "reasoning_gym"
dataset = "chain_sum"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


def test_smallest_configuration_takes_every_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST))
    assert config.data.tasks[0].dataset == "chain_sum"
    assert config.run_dir == Path("runs/demo")
    assert config.schedule.budget.tokens == 6144


def test_partly_given_section_keeps_its_other_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, f'{SMALLEST}\n[run]\nname = "other"\n'))
    assert config.run_dir == Path("runs/other")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss.mismatch=tis", {"loss": {"mismatch": "tis"}}),
        ('loss.mismatch="tis"', {"loss": {"mismatch": "tis"}}),
        ("learner.lr=0", {"learner": {"lr": 0.0}}),
        ("learner.betas=[0.8, 0.9]", {"learner": {"betas": (0.8, 0.9)}}),
        ("schedule.filter_zero_variance=false", {"schedule": {"filter_zero_variance": False}}),
        ("run.dir=/data/a=b", {"run": {"dir": Path("/data/a=b")}}),
        ("schedule.budget.tokens=9000", {"schedule": {"budget": {"tokens": 9000}}}),
    ],
)
def test_override_is_read_as_toml_else_as_text(
    tmp_path: Path, override: str, expected: dict[str, dict[str, Any]]
) -> None:
    config = load_config(write(tmp_path, SMALLEST), [override])
    for section, values in expected.items():
        dumped = getattr(config, section).model_dump()
        for name, value in values.items():
            if isinstance(value, dict):
                assert dumped[name] | value == dumped[name]
            else:
                assert dumped[name] == value
                assert type(dumped[name]) is type(value)


def test_override_of_a_list_item_and_of_free_parameters(tmp_path: Path) -> None:
    path = write(tmp_path, SMALLEST)
    config = load_config(path, ["data.tasks.0.weight=2", "data.tasks.0.params.max_terms=5"])
    assert config.data.tasks[0].weight == 2.0
    assert config.data.tasks[0].params == {"max_terms": 5}


def test_later_override_wins(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, SMALLEST), ["run.seed=1", "run.seed=2"])
    assert config.run.seed == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.seed", "must look like section.key=value"),
        ("=3", "must look like section.key=value"),
        ("run..seed=3", "must look like section.key=value"),
        ("data.tasks.7.weight=1", "data.tasks has 1 items"),
        ("data.tasks.first.weight=1", "data.tasks is a list"),
        ("data.tasks.0.name.x=1", "data.tasks.0.name is a single value"),
        ("run.0=1", "run is a table, not a list"),
        (".".join(["a"] * 40) + "=1", "nested too deeply"),
    ],
)
def test_override_that_cannot_be_applied(tmp_path: Path, override: str, said: str) -> None:
    message = refusal(tmp_path, SMALLEST, override)
    assert f"--set {override}" in message
    assert said in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[learner]\nlr = 'fast'", 'learner.lr = "fast": must be a number, at least 0'),
        ("[learner]\nsteps = 2.5", "learner.steps = 2.5: must be a whole number, at least 1"),
        ("[learner]\nsteps = true", "learner.steps = true: must be a whole number"),
        ("[learner]\nsteps = '5'", 'learner.steps = "5": must be a whole number'),
        ("[worker]\ncount = -1", "worker.count = -1: must be a whole number, at least 0"),
        ("[worker]\nengine = 'sglang'", "must be one of 'transformers', 'vllm', 'scripted'"),
        ("[starter]\nhidden_size = 33", "at least 32, a multiple of 32"),
        ("[run]\nname = 'a{b}'", "run.name = "),
        ("[weights]\ncanary = 1", "weights.canary = 1: must be true or false"),
        ("[learner]\nbetas = [0.9]", "must be a list of 2 values, each a number"),
        ("[learner]\nlr = nan", "learner.lr = nan: must be a finite number"),
        ("[learner]\nlr = inf", "learner.lr = inf: must be a finite number"),
        ("[run]\nname = 2026-01-01", "dates and times are no settings"),
        ("learner = 3", "learner = 3: must be a table with the settings backend, steps, lr"),
        ("[sampling]\ntop_p = 0.9", "cannot reproduce the log-probs"),
        ("[loss]\nmask_low = 6.0", "mask_low must be below mask_high"),
        ("[schedule]\nretention_max = 'never'", "a whole number, or left out, at least 0"),
    ],
)
def test_wrong_value_is_named_with_what_is_allowed(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, f"{text}\n{SMALLEST}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[learner]\nlrr = 1", "learner.lrr: unknown setting; did you mean learner.lr?"),
        ("[shedule]\nmode = 1", "shedule: unknown setting; did you mean schedule?"),
        ("[sampling]\nmismatch = 1", "did you mean loss.mismatch?"),
        ("[schedule]\nmax_new_tokens = 1", "did you mean sampling.max_new_tokens?"),
        ("[run]\nzzz = 1", "run.zzz: unknown setting (known in run: name, dir, seed)"),
    ],
)
def test_unknown_key_is_refused_with_the_nearest(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, f"{text}\n{SMALLEST}")


def test_unknown_key_inside_a_list_item(tmp_path: Path) -> None:
    message = refusal(tmp_path, f"{SMALLEST}wieght = 2.0\n")
    assert "data.tasks.0.wieght: unknown setting; did you mean data.tasks.*.weight?" in message
    assert "data.tasks = " not in message  # one problem, not also "too few items"


@pytest.mark.parametrize(
    ("text", "first", "second"),
    [
        (
            "[schedule]\nbudget = {tokens = 10}",
            "schedule.budget.tokens (10)",
            "sampling.max_new_tokens (96)",
        ),
        (
            "[sampling]\nmax_new_tokens = 160",
            "sampling.max_new_tokens (160)",
            "model.max_model_len_tokens (160)",
        ),
        ("[schedule]\ngroup_size = 1", "schedule.group_size = 1", "filter_zero_variance = false"),
        (
            "[schedule]\nmode = 'rounds'\npool_capacity = 4",
            "schedule.pool_capacity (4)",
            "schedule.group_size (8)",
        ),
        (
            "[worker]\nsession_ttl_ms = 1000",
            "worker.session_ttl_ms (1000)",
            "worker.heartbeat_ms (500)",
        ),
        (
            "[loss]\nrouting_replay = true\n[starter]\narchitecture = 'qwen3_moe'",
            "loss.routing_replay = true",
            'worker.engine = "vllm"',
        ),
        (
            "[loss]\nrouting_replay = true\n[worker]\nengine = 'vllm'",
            "loss.routing_replay = true",
            'starter.architecture = "qwen3_moe"',
        ),
    ],
)
def test_impossible_pair_names_both_settings(
    tmp_path: Path, text: str, first: str, second: str
) -> None:
    message = refusal(tmp_path, f"{text}\n{SMALLEST}")
    assert first in message
    assert second in message


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    text = f"[learner]\nlr = 'x'\n[worker]\nengine = 'y'\n[run]\nnmae = 'z'\n{SMALLEST}"
    message = refusal(tmp_path, text, "loss.mismatch=nothing")
    assert "4 problems" in message
    for key in ("learner.lr", "worker.engine", "run.nmae", "loss.mismatch"):
        assert f"\n  {key}" in message
    assert "(from --set loss.mismatch=nothing)" in message


def test_both_impossible_pairs_are_told(tmp_path: Path) -> None:
    text = f"[schedule]\ngroup_size = 1\n[worker]\nsession_ttl_ms = 1000\n{SMALLEST}"
    message = refusal(tmp_path, text)
    assert "2 problems" in message


def test_missing_tasks(tmp_path: Path) -> None:
    assert "data: is missing" in refusal(tmp_path, "")
    assert "data.tasks: is missing" in refusal(tmp_path, "[data]\n")
    assert "data.tasks = []" in refusal(tmp_path, "[data]\ntasks = []")
    assert "data.tasks.0.kind: is missing" in refusal(tmp_path, "[[data.tasks]]\nname = 'a'")


def test_file_that_is_no_configuration(tmp_path: Path) -> None:
    assert "not valid TOML" in refusal(tmp_path, "[run\n")
    assert "line 2" in refusal(tmp_path, "[run]\nname = \n")
    assert "nested too deeply" in refusal(tmp_path, "a = " + "[" * 5000 + "]" * 5000)
    assert "nested too deeply" in refusal(tmp_path, "a = " + "[" * 40 + "]" * 40)
    assert "larger than" in refusal(tmp_path, "#" * (MAX_CONFIG_BYTES + 1))


def test_file_that_is_not_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b"[run]\n# gr\xfc\xdfe\n")
    with pytest.raises(ConfigError, match=r"latin\.toml: not UTF-8 text \(byte 0xfc in line 2\)"):
        load_config(path)


def test_utf8_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.encode())
    assert load_config(path).data.tasks[0].name == "sums"


def test_file_that_is_not_there_or_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(write(tmp_path, SMALLEST) / "below.toml")


def test_resolved_forms_load_back_to_the_same(tmp_path: Path) -> None:
    overrides = ["schedule.retention_max=2", "data.tasks.0.params.ranges=[[1, 2], [3, 4]]"]
    config = load_config(write(tmp_path, SMALLEST), overrides)
    again = tmp_path / "resolved.toml"
    again.write_text(resolved_toml(config), encoding="utf-8")
    assert load_config(again) == config
    assert config_from_json(resolved_json(config)) == config


def test_stored_configuration_of_another_release_is_refused(tmp_path: Path) -> None:
    stored = json.loads(resolved_json(load_config(write(tmp_path, SMALLEST))))
    stored["learner"]["gone_setting"] = 1
    with pytest.raises(ConfigError, match=r"stored configuration: learner\.gone_setting"):
        config_from_json(json.dumps(stored))


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=/elsewhere",
        "redis.url=redis://far:6379/0",
        "worker.count=9",
        "worker.threads=4",
        "worker.max_concurrent=8",
        "worker.engine_options.device=1",
        "learner.ranks=2",
        "learner.backend=deepspeed",
        "learner.microbatch_tokens=99",
        "learner.logprob_chunk_tokens=9",
        "learner.activation_checkpointing=true",
        "observability.log_level=debug",
    ],
)
def test_hash_ignores_what_may_differ_between_roles(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, SMALLEST)
    assert config_hash(load_config(path)) == config_hash(load_config(path, [override]))


@pytest.mark.parametrize(
    "override",
    ["learner.lr=0.5", "run.seed=1", "worker.flush_tokens=32", "data.tasks.0.weight=3"],
)
def test_hash_changes_with_what_must_agree(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, SMALLEST)
    assert config_hash(load_config(path)) != config_hash(load_config(path, [override]))


def test_every_known_key_can_be_found_again() -> None:
    for name in known_keys():
        assert nearest_keys(name + "x")[0] == name


def test_known_keys_cover_the_schema(tmp_path: Path) -> None:
    dumped = load_config(write(tmp_path, SMALLEST)).model_dump()
    dumped["data"]["tasks"] = {"*": dumped["data"]["tasks"][0]}

    def leaves(value: dict[str, Any], prefix: str) -> list[str]:
        names: list[str] = []
        for key, each in value.items():
            name = f"{prefix}{key}"
            is_table = isinstance(each, dict) and key not in ("params", "engine_options")
            names += leaves(each, f"{name}.") if is_table else [name]
        return names

    assert sorted(known_keys()) == sorted(leaves(dumped, ""))


def load_or_refuse(path: Path, *overrides: str) -> Config | None:
    """None after a refusal in words; any other error is the test's failure."""
    try:
        return load_config(path, overrides)
    except ConfigError as error:
        message = str(error)
    assert message.startswith(f"{path}: ")
    assert len(message) > len(f"{path}: ")
    return None


toml_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.text(max_size=8)
    | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_none(each) for each in value if each is not None]
    return value


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(list(Config.model_fields)),
        st.dictionaries(
            st.sampled_from([name.rsplit(".", 1)[-1] for name in known_keys()])
            | st.text(max_size=6),
            toml_values,
            max_size=4,
        )
        | toml_values,
        max_size=4,
    )
)
def test_any_toml_is_loaded_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.toml"
    path.write_text(tomli_w.dumps(without_none(data)), encoding="utf-8")
    config = load_or_refuse(path)
    assert config is None or config_from_json(resolved_json(config)) == config


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_loaded_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.toml"
    path.write_bytes(SMALLEST.encode() + raw)
    load_or_refuse(path)


@settings(max_examples=200, deadline=None)
@given(
    st.text(max_size=30) | st.builds("{}={}".format, st.sampled_from(list(known_keys())), st.text())
)
def test_any_override_is_applied_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, override: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.toml"
    path.write_text(SMALLEST, encoding="utf-8")
    load_or_refuse(path, override)
