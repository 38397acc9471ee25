"""The learner's step: tokens a second, MFU, memory, and where the time goes.

``python -m benchmarks.learner_step [--device cuda] [--models dense-300m,dense-1b]
[--sizes 8192,32768,65536] [--arms packed,padded,naive] [--out FILE]`` runs each cell in a process
of its own, so that none has memory of another's and an arm that fails costs its own row only.

Arms: ``packed`` (compiled layers), ``packed-eager``, ``packed-deepspeed`` (ZeRO-1, compiled too),
``packed-deepspeed-eager``, ``packed-cudnn`` (one sequence after the other by cuDNN's attention),
``packed-flash4`` (FlashAttention 4), ``padded`` (the learner with packing off, not compiled),
``naive`` (transformers and DeepSpeed ZeRO-1 in bf16, padded rows with a mask, all logits) and
``trl`` (the step of its ``GRPOTrainer`` on the same padded rows). ``--ranks 2`` starts each cell on
two GPUs (or gloo on a CPU) and gives each as many tokens; ``naive`` and ``trl`` have one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import PIPE
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from benchmarks.learner_naive import NaiveStep
from benchmarks.learner_trl import TrlStep
from benchmarks.machine import machine
from benchmarks.random_batch import PROMPT_TOKENS, random_batch
from benchmarks.report import Table
from benchmarks.vllm_models import SHAPES
from learner.backends.base import StepResult
from learner.backends.deepspeed_backend import DeepSpeedBackend
from learner.backends.flash4 import is_used
from learner.backends.sharding import RankGroup
from learner.backends.torch_backend import TorchBackend, TorchSettings
from learner.devices import resolve_device
from learner.speed import sequence_lengths
from ringasync.config.model_shape import ModelShape, peak_tflops_of, shape_of, train_flops
from ringasync.config.schema import LearnerConfig, LossConfig

COMPILED = ("packed", "packed-cudnn", "packed-flash4", "packed-deepspeed")
ELSEWHERE = ("naive", "trl")
"""Not this project's step."""
DEEPSPEED = ("packed-deepspeed", "packed-deepspeed-eager")
ARMS = (*COMPILED, "packed-eager", "packed-deepspeed-eager", "padded", *ELSEWHERE)
KEPT_BYTES = 32 * 2**30
"""Activations above this, by estimate, are computed again: what an 80 GB device has room for."""
_STACKS_S = 3.0
"""A cell that is late may take this long to write its stacks."""
_COLUMNS = (
    *("cell", "tokens/s", "MFU %", "step s", "forward s", "backward s", "optimizer s"),
    *("peak GiB", "padding %", "notes"),
)


def lengths_of(size: int, tokens: int, shortest: float) -> list[int]:
    """Lengths of sequences, ``tokens`` or a little less together: one of ``size``, the others
    drawn evenly between ``shortest`` of it and all of it."""
    generator = np.random.default_rng(size)
    lengths = [size]
    while True:
        one = int(generator.integers(max(PROMPT_TOKENS + 1, int(shortest * size)), size + 1))
        if sum(lengths) + one > tokens:
            return lengths
        lengths.append(one)


def model_of(name: str, longest: int, device: torch.device) -> Any:
    """Random float32 weights, made on ``device``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {**SHAPES[name], "max_position_embeddings": longest}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def learner_of(arguments: argparse.Namespace, shape: ModelShape, size: int) -> LearnerConfig:
    """The settings of an arm of the learner's own."""
    arm = str(arguments.arms)
    packed = "sequences" if arm == "packed-cudnn" else "auto"
    return LearnerConfig.model_validate(
        {
            "backend": "deepspeed" if arm in DEEPSPEED else "torch",
            "device": arguments.device,
            "lr": 1e-6,
            "warmup_steps": 0,
            "microbatch_tokens": arguments.microbatch_tokens,
            "logprob_chunk_tokens": arguments.chunk,
            "packing": packed if arm.startswith("packed") else "off",
            "compile": arm in COMPILED and not arguments.no_compile,
            "activation_checkpointing": checkpoints(arguments, shape, size),
            "residual_dtype": arguments.residual,
            "ranks": arguments.ranks,
            "attention_kernel": "flash4" if arm == "packed-flash4" else "torch",
        }
    )


def checkpoints(arguments: argparse.Namespace, shape: ModelShape, size: int) -> bool:
    """The same rule for all arms, so that none wins by what it keeps."""
    if arguments.checkpointing != "auto":
        return bool(arguments.checkpointing == "on")
    tokens = max(size, arguments.microbatch_tokens)
    return bool(shape.layers * tokens * shape.activation_values_a_token() * 2 > KEPT_BYTES)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One arm, model and size; the median of the timed steps."""
    faulthandler.register(signal.SIGUSR1)
    arm, name, size = arguments.arms, arguments.models, int(arguments.sizes)
    shape = shape_of(SHAPES[name])
    assert shape is not None
    learner = learner_of(arguments, shape, size)
    group = RankGroup.join(learner) if arguments.ranks > 1 else None
    device = resolve_device(arguments.device) if group is None else group.device
    cuda = device.type == "cuda"
    tokens = arguments.tokens * arguments.ranks
    batch = random_batch(
        [length - PROMPT_TOKENS for length in lengths_of(size, tokens, arguments.shortest)],
        shape.vocab,
    )
    model = model_of(name, size, device)
    dtype = torch.bfloat16 if cuda else torch.float32
    step: Any
    if arm in ELSEWHERE:
        step = (NaiveStep if arm == "naive" else TrlStep)(model, learner, dtype)
    else:
        settings = TorchSettings(learner, LossConfig(mismatch="none"), dtype=dtype)
        kind = DeepSpeedBackend if arm in DEEPSPEED else TorchBackend
        step = kind(model, settings, group=group)
        if arm == "packed-flash4" and not is_used():
            raise RuntimeError("FlashAttention 4 is not used here: see the warning above")
    times, results = [], []
    with _attention_of(arm, cuda):
        for number in range(arguments.warmup + arguments.steps):
            if number == arguments.warmup and cuda:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            results.append(step.train_batch(batch))  # its end waits for the device
            times.append(time.perf_counter() - began)
        if arguments.profile:
            profile(step, batch, cuda, Path(f"{arguments.profile}-{name}-{size}-{arm}.txt"))
    step_s = statistics.median(times[arguments.warmup :])
    lengths = sequence_lengths(batch)
    tflop = train_flops(shape, lengths, batch.trained_tokens) / 1e12
    peak = peak_tflops_of(torch.cuda.get_device_name(device)) if cuda else 0.0
    last: StepResult = results[-1]
    return {
        "arm": arm,
        "model": name,
        "size": size,
        "lengths": lengths,
        "tokens": sum(lengths),
        "step_s": step_s,
        "all_step_s": times,
        "tokens_per_s": sum(lengths) / step_s,
        "tflop": tflop,
        "mfu": tflop / step_s / peak / arguments.ranks if peak else None,
        "ranks": arguments.ranks,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else _resident_bytes(),
        "seconds": dict(last.seconds),
        "loss": last.loss,
        "grad_norm": last.grad_norm,
        "padding": padding(lengths, arguments.microbatch_tokens, arm),
        "activation_checkpointing": learner.activation_checkpointing,
        "compile": learner.compile and arm not in ELSEWHERE,
        "packing": getattr(step, "_packing", None),
        "flash4": is_used(),
        "residual_dtype": {"naive": "model", "trl": "float32"}.get(arm, learner.residual_dtype),
    }


def profile(step: Any, batch: Any, cuda: bool, out: Path) -> None:
    """One more step under torch's profiler: the kernels with their share of the time, as text."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        step.train_batch(batch)
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table = seen.key_averages().table(sort_by=order, row_limit=60, max_name_column_width=90)
    out.write_text(table, encoding="utf-8")


def padding(lengths: Sequence[int], limit: int, arm: str) -> float:
    """Share of the positions that are padding."""
    from learner.backends.collate import plan_microbatches

    if arm.startswith("packed"):
        return 0.0
    plan = plan_microbatches(lengths, limit)
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in plan)
    return 1 - sum(lengths) / padded


def _attention_of(arm: str, cuda: bool) -> Any:
    from contextlib import nullcontext

    from torch.nn.attention import SDPBackend, sdpa_kernel

    if arm != "packed-cudnn" or not cuda:
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _resident_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cell(arguments: argparse.Namespace, arm: str, name: str, size: int) -> dict[str, Any]:
    """``measure`` in a process of its own; what goes wrong there is the row's ``error``."""
    row: dict[str, Any] = {"arm": arm, "model": name, "size": size}
    packages = {"trl": "trl", "packed-flash4": "flash_attn"}
    needed = (packages | dict.fromkeys(("naive", *DEEPSPEED), "deepspeed")).get(arm)
    if needed and importlib.util.find_spec(needed) is None:
        return row | {"error": f"skipped: {needed} is not installed here"}
    if arm in ELSEWHERE and arguments.ranks > 1:
        return row | {"error": "skipped: it has one rank"}
    command = [sys.executable, "-m", "benchmarks.learner_step", *sys.argv[1:], "--only"]
    if arguments.ranks > 1:
        launched = ["--standalone", f"--nproc-per-node={arguments.ranks}"]
        command[1:2] = ["-m", "torch.distributed.run", *launched, "-m"]
    command += ["--arms", arm, "--models", name, "--sizes", str(size)]
    started = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True)
    try:
        stdout, stderr = started.communicate(timeout=arguments.cell_timeout_s)
    except subprocess.TimeoutExpired:
        lines = _stacks(started, arguments.ranks > 1).strip().splitlines()
        late = f"not done in {arguments.cell_timeout_s:.0f} s"
        return row | {"error": late, "stderr": "\n".join(lines[-120:])}
    if started.returncode == 0:
        found: dict[str, Any] = json.loads(stdout.strip().splitlines()[-1])
        return found
    lines = [line for line in stderr.strip().splitlines() if line.strip()]
    error = next((one for one in reversed(lines) if "Error" in one), lines[-1] if lines else "")
    return row | {"error": error[:300], "stderr": "\n".join(lines[-40:])}


def _stacks(cell: subprocess.Popen[str], is_launcher: bool) -> str:
    """Have a cell's processes say where they are, kill them, and return all that they wrote."""
    processes = psutil.Process(cell.pid).children(recursive=True)
    if not is_launcher:
        processes.append(psutil.Process(cell.pid))
    with contextlib.suppress(psutil.Error):
        for one in processes:
            one.send_signal(signal.SIGUSR1)
        psutil.wait_procs(processes, timeout=_STACKS_S)
    for one in processes:
        with contextlib.suppress(psutil.Error):
            one.kill()
    cell.kill()
    return cell.communicate()[1]


def table_of(rows: list[dict[str, Any]]) -> Table:
    """For reading; the JSON keeps all."""
    return Table("Learner step", _COLUMNS, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str | float]:
    name = f"{row['model']} {row['size']} {row['arm']}"
    if "error" in row:
        return [name, *[""] * (len(_COLUMNS) - 2), row["error"].replace("|", "/")[:120]]
    used = [flag for flag in ("compile", "activation_checkpointing") if row[flag]]
    seconds = row["seconds"]
    return [
        name,
        row["tokens_per_s"],
        "" if row["mfu"] is None else 100 * row["mfu"],
        row["step_s"],
        *(seconds.get(part, 0.0) for part in ("forward", "backward", "optimizer")),
        row["peak_bytes"] / 2**30,
        100 * row["padding"],
        ", ".join([*used, *([row["packing"]] if row["packing"] else [])]),
    ]


def parser() -> argparse.ArgumentParser:
    """All arguments; the defaults of ``--models`` and so on are for one 80 GB device."""
    found = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--device", default="cpu")
    found.add_argument("--models", default="dense-300m,dense-1b")
    found.add_argument("--sizes", default="8192,32768,65536")
    found.add_argument("--arms", default=",".join(ARMS))
    found.add_argument("--tokens", type=int, default=131072, help="a step, at most")
    found.add_argument("--shortest", type=float, default=0.25, help="share of the size")
    found.add_argument("--ranks", type=int, default=1, help="processes that train together")
    found.add_argument("--microbatch-tokens", type=int, default=32768)
    found.add_argument("--chunk", type=int, default=8192)
    found.add_argument("--checkpointing", choices=("auto", "on", "off"), default="auto")
    found.add_argument("--residual", choices=("float32", "model"), default="float32")
    found.add_argument("--no-compile", action="store_true")
    found.add_argument("--profile", help="one more step under a profiler; the begin of file names")
    found.add_argument("--warmup", type=int, default=2)
    found.add_argument("--steps", type=int, default=3)
    found.add_argument("--cell-timeout-s", type=float, default=180)
    found.add_argument("--budget-s", type=float, default=570, help="no cell begins after it")
    found.add_argument("--out", type=Path)
    found.add_argument("--only", action="store_true", help="one cell, here; prints its JSON")
    return found


def main() -> int:
    """All cells, by size, then model, then arm; ``--out`` is written anew after each."""
    arguments = parser().parse_args()
    if arguments.only:
        row = measure(arguments)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(json.dumps(row), flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        return 0
    began, rows = time.monotonic(), []
    where = machine()
    for size in map(int, arguments.sizes.split(",")):
        for name in arguments.models.split(","):
            for arm in arguments.arms.split(","):
                if time.monotonic() - began > arguments.budget_s:
                    late = {"arm": arm, "model": name, "size": size, "error": "no time left"}
                    rows.append(late)
                    continue
                rows.append(cell(arguments, arm, name, size))
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "stderr"}), flush=True)
                if arguments.out:
                    settings = {k: str(v) for k, v in vars(arguments).items()}
                    report = {"machine": where, "settings": settings, "rows": rows}
                    arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table_of(rows).markdown())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
