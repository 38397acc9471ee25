"""What the vLLM benchmarks share: models with random weights, prompts and lengths, engines.

Random weights cost the device what trained ones do. Their answers are spread out (about 8 nats a
token with 32,000 ids), so nothing is cheaper for being easy to guess.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, version
from ringasync.broker.types import NewGroup
from workers.engines.base import SamplingParams
from workers.engines.vllm import compat
from workers.engines.vllm.engine import Kv, VllmEngine
from workers.engines.vllm.options import VllmOptions

PLAIN_SAMPLING = SamplingParams(temperature=1.0, eos_token_ids=())

_DENSE = {"model_type": "qwen3", "head_dim": 64, "num_key_value_heads": 8, "vocab_size": 32_000}
SHAPES: Mapping[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 192,
        "vocab_size": 512,
    },
    "dense-300m": _DENSE
    | {
        "num_hidden_layers": 24,
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 2816,
    },
    "dense-1b": _DENSE
    | {
        "num_hidden_layers": 24,
        "hidden_size": 2048,
        "head_dim": 128,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
    },
    "moe": _DENSE
    | {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "norm_topk_prob": True,
    },
}
"""By the name on the command line; heads and embeddings are not tied. About 0.35, 1.3 and 0.3
thousand million parameters (``moe`` uses 0.13 of them for a token)."""

_WINDOW_TOKENS = 8192
_PROMPT_TOKENS = (64, 256)
_SIGMA = 0.7
"""Of the log-normal response lengths: a hundredth is four times as long as the mean."""
_LONGEST_OVER_MEAN = 4.0


@dataclass(frozen=True, slots=True)
class Load:
    """What is generated: groups that share their prompt, and lengths with a long tail."""

    rollouts: int
    mean_tokens: float
    vocab_size: int
    group_size: int = 8

    @property
    def longest(self) -> int:
        """Longest response."""
        return max(2, round(self.mean_tokens * _LONGEST_OVER_MEAN))

    @property
    def window_tokens(self) -> int:
        """Window that holds every rollout and a probe, in whole KV blocks of the CPU backend."""
        return -(-(_PROMPT_TOKENS[1] + self.longest) // 128) * 128

    def groups(self, salt: int) -> list[NewGroup]:
        """Alike for each ``salt`` but for the first id of every prompt.

        So each arm and round finds a prefix cache that knows nothing of its prompts, and the
        rollouts of a group find each other's.
        """
        random = np.random.default_rng(7)
        count = -(-self.rollouts // self.group_size)
        lengths = response_lengths(count, self.mean_tokens, self.longest)
        random.shuffle(lengths)
        groups = []
        for number, length in enumerate(lengths):
            tokens = int(random.integers(*_PROMPT_TOKENS, endpoint=True)) - 1
            ids = random.integers(1, self.vocab_size, tokens).tolist()
            groups.append(
                NewGroup(
                    group_id=f"g{number:06d}",
                    kind="train",
                    domain="bench",
                    prompt="",
                    prompt_ids=(salt % self.vocab_size, *ids),
                    task={},
                    source_index=number,
                    size=self.group_size,
                    max_new_tokens=length,
                )
            )
        return groups


def response_lengths(count: int, mean: float, longest: int) -> list[int]:
    """Quantiles of a log-normal distribution, rising: no luck of the draw in the total."""
    normal = statistics.NormalDist(float(np.log(mean)) - _SIGMA**2 / 2, _SIGMA)
    drawn = [np.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    return [min(max(round(float(length)), 2), longest) for length in drawn]


def write_model(folder: Path, name: str, seed: int = 0) -> Path:
    """A model of ``SHAPES`` with random weights, in the precision of the device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "config.json").exists():
        return folder
    fields = dict(SHAPES[name])
    kind, hidden = fields.pop("model_type"), fields["hidden_size"]
    config = AutoConfig.for_model(
        kind,
        **fields,
        max_position_embeddings=_WINDOW_TOKENS,
        tie_word_embeddings=False,
        initializer_range=0.64 / hidden**0.5,  # 0.02 at 1024
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight *= 3  # logits with a deviation of about 2
    _save(model.to(getattr(torch, dtype())), folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    # Into place by a rename: what is left of a run that was cut off must not look like a model.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(folder)


def write_changed(folder: Path, source: Path, change: float, seed: int = 1) -> Path:
    """The same model after "training": each matrix moved by ``change`` of its own deviation."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
            continue
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dim() > 1:
                noise = torch.randn(tensor.shape, generator=generator)
                moved = tensor.float() + change * float(tensor.float().std()) * noise
                tensors[name] = moved.to(tensor.dtype)
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
    return folder


def dtype() -> str:
    """Precision of weights and engines: bf16 where there is a GPU."""
    return "float32" if compat.is_cpu() else "bfloat16"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What all engines of a run have in common. ``gpu_memory`` is each engine's share."""

    concurrent: int
    window_tokens: int
    gpu_memory: float = 0.4
    gather_ms: int = 20
    load: str = "auto"
    staging: str = "auto"
    kv: Kv = "recompute"
    probe_places: bool = False
    """Room in the batch for a probe beside all rollouts. Without it the batch has exactly
    ``concurrent`` places, so that arms that queue more run no more at once than a worker does."""
    engine_args: Mapping[str, Any] | None = None

    def make(self) -> VllmEngine:
        """Our engine, not started."""
        places = {} if self.probe_places else {"max_num_seqs": self.concurrent}
        options = VllmOptions(
            gpu_memory_utilization=self.gpu_memory,
            kv_cache_bytes=(64 << 20) if compat.is_cpu() else 0,
            gather_ms=self.gather_ms,
            load=self.load,  # type: ignore[arg-type]
            staging=self.staging,  # type: ignore[arg-type]
            engine_args={**places, **(self.engine_args or {})},
        )
        return VllmEngine(
            PLAIN_SAMPLING,
            max_concurrent=self.concurrent,
            max_model_len_tokens=self.window_tokens,
            seed=0,
            dtype=dtype(),
            kv=self.kv,
            options=options,
        )

    def plain_arguments(self, weights_dir: Path, **more: Any) -> dict[str, Any]:
        """The very arguments of our engine for a bare AsyncLLM, but for its scheduling policy.

        Our worker extension stays: unused, it ends EngineCore when this process is killed.
        """
        arguments = self.make()._arguments(weights_dir)
        del arguments["scheduling_policy"]
        return compat.known_engine_args(arguments | more)


def parse_engine_args(text: str) -> dict[str, Any]:
    """More engine arguments from the command line. Raises ``ValueError`` unless a JSON object."""
    found = json.loads(text or "{}")
    if not isinstance(found, dict):
        raise ValueError("engine arguments must be a JSON object")
    return found


def machine_with_gpu() -> dict[str, str]:
    """``machine()``, with what matters to vLLM."""
    where = machine() | {"vllm": compat.installed_version()}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        where["gpu"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    where["torch"] = version("torch")
    return where


def total_tokens(groups: Sequence[NewGroup]) -> int:
    """Tokens that all rollouts of these groups generate together."""
    return sum(group.size * group.max_new_tokens for group in groups)
