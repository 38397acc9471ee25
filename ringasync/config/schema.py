"""Every setting of a run: unit, range, default. Unknown keys are refused.

Durations end in ``_s`` or ``_ms``, sizes in ``_tokens`` or ``_bytes``. Secrets are not settings:
the Redis password comes from ``RINGASYNC_REDIS_PASSWORD``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from ringasync.config.learner import LearnerConfig as LearnerConfig
from ringasync.config.pairs import impossible_pairs
from ringasync.config.section import Section
from ringasync.config.starter import StarterConfig as StarterConfig

RUN_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""No braces, colons or slashes: the name is a Redis hash tag and a folder name."""


def _without_password(url: str) -> str:
    if "@" in url and ":" in url.rpartition("@")[0].rpartition("/")[2]:
        raise ValueError(
            "holds a password, and configurations are stored and shown: take it out and set "
            "RINGASYNC_REDIS_PASSWORD"
        )
    return url


Address = Annotated[str, AfterValidator(_without_password)]
"""Where a Redis is; the password is not a part of it."""


class RunConfig(Section):
    """Which run this is and where its files lie."""

    name: str = Field("demo", pattern=RUN_NAME_PATTERN)
    dir: Path = Field(Path("runs"), validate_default=False)
    seed: int = Field(0, ge=0, lt=2**31)


class RedisConfig(Section):
    """The broker. ``embedded`` starts a loopback-only server in the run folder."""

    url: Address = "embedded"
    """``redis://``, ``redis+sentinel://`` or ``redis+cluster://`` (``docs/pods.md``), ``rediss`` is
    TLS; never with a password, see ``docs/security.md``."""
    tls_ca_file: str = ""
    """CA certificates (PEM) that may have signed the server's; empty: the system's."""
    tls_cert_file: str = ""
    tls_key_file: str = ""
    """Our own certificate and its key, for a server that asks clients for one."""
    connect_timeout_s: float = Field(5.0, gt=0)
    retry_budget_s: float = Field(60.0, gt=0)
    """How long a role retries an unreachable Redis before it gives up with exit code 3."""
    maxmemory_bytes: int = Field(1 << 30, ge=1 << 20)
    """Limit given to the embedded server (``noeviction``)."""


class ModelConfig(Section):
    """The policy. ``path``: a local folder, a hub name, or ``starter`` for the small demo model."""

    path: str = "starter"
    max_model_len_tokens: int = Field(160, ge=8)
    dtype: Literal["float32", "bfloat16"] = "float32"
    head_dtype: Literal["model", "float32"] = "model"
    """``float32``: the LM head multiplies and gives its logits in float32 while the body stays in
    ``dtype``, in the learner and in the inference engine: a mismatch reducer, see docs/moe.md."""


class TaskConfig(Section):
    """One domain of the prompt mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,48}$")
    kind: Literal["reasoning_gym", "mathematics", "jsonl", "hub"]
    weight: float = Field(1.0, gt=0)
    dataset: str = ""
    """reasoning_gym: dataset name. jsonl: file path. hub: dataset name. mathematics: family."""
    params: dict[str, Any] = Field(default_factory=dict)
    split: str = "train"
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    answer_mark: str = ""
    """reasoning_gym: the answer is what follows the last such mark; empty: the whole response."""
    compact: bool = False
    """Short form of the question, for small character-level models."""
    verifier: str = ""
    """Empty: the kind's own; else ``exact``, ``math_verify`` or ``python:pkg.mod:function``."""


class DataConfig(Section):
    """Prompts: a weighted mixture of tasks, rendered by a chat-like template."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    template: str = "{prompt}"
    """Format string with ``{prompt}``, or ``tokenizer`` for the tokenizer's own chat template."""
    epochs: int | None = Field(None, ge=1)
    """Passes over finite sources; None repeats them for ever."""


class SamplingConfig(Section):
    """How rollouts are sampled. What would make log-probs wrong is refused."""

    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = 1.0
    max_new_tokens: int = Field(96, ge=1)

    @model_validator(mode="after")
    def _full_distribution(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0 or self.repetition_penalty != 1.0:
            raise ValueError(
                "top_p must be 1, top_k 0 and repetition_penalty 1: the learner cannot reproduce "
                "the log-probs of a cut distribution; use temperature instead"
            )
        return self


class WorkerConfig(Section):
    """Rollout workers."""

    count: int = Field(2, ge=0)
    """Workers that ``ringasync up`` starts; more may join at any time."""
    engine: Literal["transformers", "vllm", "scripted"] = "transformers"
    """``scripted`` is no model but a hash that looks like one, for tests of everything around it:
    it starts at once and takes no torch. ``engine_options.step_interval_s`` sets its pace."""
    max_concurrent: int = Field(64, ge=1)
    """Rollouts that one worker generates at once."""
    flush_tokens: int = Field(64, ge=1)
    flush_ms: int = Field(500, ge=10)
    heartbeat_ms: int = Field(500, ge=20)
    session_ttl_ms: int = Field(5000, ge=200)
    """A session without heartbeat for this long is dead; its leases return."""
    drain_timeout_s: float = Field(20.0, gt=0)
    threads: int = Field(1, ge=1)
    gpus: tuple[int, ...] = ()
    """``ringasync up``: the GPUs of the host that its workers get in turn, with tensor parallelism
    as many each as that has ranks. Empty: every worker sees all of them."""
    kv: Literal["recompute", "keep", "rolling"] = "recompute"
    """What becomes of the KV of running rollouts at a swap: all computed anew at once; kept, with
    log-probs that are off by what the weights moved; or (vLLM) computed anew a few at a time."""
    engine_options: dict[str, Any] = Field(default_factory=dict)


class GraderConfig(Section):
    """Verifiers run in separate processes with limits."""

    in_worker: bool = True
    processes: int = Field(1, ge=1)
    timeout_s: float = Field(10.0, gt=0)
    memory_bytes: int = Field(2 << 30, ge=64 << 20)
    max_attempts: int = Field(3, ge=1)
    isolation: Literal["required", "preferred", "off"] = "required"
    """Sandbox (bubblewrap) for users' functions and reasoning-gym, see docs/sandbox.md. Where the
    host has none, ``required`` refuses users' functions and ``preferred`` runs them with a warning.
    """
    readable: tuple[str, ...] = ()
    """Files and folders that the sandbox shows, read-only, beside Python's path."""


class BudgetConfig(Section):
    """Phi of C3PO and C3PO++."""

    tokens: int = Field(6144, ge=1)
    count: Literal["trainable", "completed", "generated"] = "trainable"


class ScheduleConfig(Section):
    """C3PO++: Algorithm 1 as ``rounds``, or ``pipelined``."""

    mode: Literal["pipelined", "rounds"] = "pipelined"
    group_size: int = Field(8, ge=1)
    budget: BudgetConfig = BudgetConfig()
    pool_capacity: int = Field(256, ge=1)
    """Omega: rollouts queued, parked or generating at once (``rounds``)."""
    retention_max: int | None = Field(None, ge=0)
    """sigma: a rollout carried over more often is purged. None: never."""
    purge_action: Literal["drop_group", "replace"] = "drop_group"
    max_staleness: int = Field(3, ge=0)
    """``pipelined``: learner steps between the oldest token and its training."""
    overtaking_weight: float = Field(0.25, ge=0, le=1)
    """``pipelined``: how much tokens trained past the oldest unfinished group narrow the gate.

    1: staleness is bounded by admission alone, at the price of waiting for the longest rollouts.
    0: nobody waits, and long rollouts go stale. See ``ringasync/scheduling/admission.py``."""
    colocated: bool = False
    """``rounds``: learner and workers take turns on one device; each leaves it while the other has
    its turn, see docs/scheduling.md."""
    handover_timeout_s: float = Field(900.0, gt=0)
    """``colocated``: how long the learner waits for the workers to leave the device before it ends
    with an error that names who owes it."""
    max_attempts: int = Field(5, ge=1)
    """Leases lost without progress before a rollout is quarantined."""
    filter_zero_variance: bool = True
    quarantine_breaker: float = Field(0.5, gt=0, le=1)
    """Share of the last 64 closed groups quarantined at which feeding pauses."""


class LossConfig(Section):
    """IcePop and its neighbours."""

    mismatch: Literal["icepop", "tis", "kpop", "none"] = "icepop"
    mask_low: float = Field(0.5, ge=0)
    mask_high: float = Field(5.0, gt=0)
    tis_cap: float = Field(2.0, gt=0)
    kpop_phi: float = Field(0.5, gt=0)
    clip_low: float = Field(0.2, gt=0)
    clip_high: float = Field(0.2, gt=0)
    normalizer: Literal["budget", "sequence"] = "budget"
    advantage_std: bool = True
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; below 0 it is a penalty. Ring-lite: 5e-4. See docs/losses.md."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL to the starting model, which is then kept in memory. Ring-lite: 1e-3;
    Ring-1T: 0."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    router_balance_coef: float = Field(0.0, ge=0)
    """MoE: weight of the load-balance loss. Ring-lite: 1e-5. Qwen3-MoE only, as the next."""
    router_z_coef: float = Field(0.0, ge=0)
    """MoE: weight of the routers' z loss. Ring-lite: 1e-7."""
    routing_replay: bool = False
    """MoE: workers record which experts ran for each token, and the learner's training forwards run
    the same ones. Qwen3-MoE and vLLM only; see docs/moe.md for what the records then weigh."""

    @model_validator(mode="after")
    def _band(self) -> Self:
        if self.mask_low >= self.mask_high:
            raise ValueError("mask_low must be below mask_high")
        return self


class WeightsConfig(Section):
    """How weights reach workers."""

    transport: Literal["file", "redis", "nccl"] = "file"
    """``nccl``: as ``file``, and vLLM workers on the learner's host pull the tensors out of the
    learner's memory; whatever goes wrong with that costs at most ``peer_timeout_s``."""
    keep_versions: int = Field(3, ge=2)
    peer_timeout_s: float = Field(60.0, gt=0)
    """Transport ``nccl``: how long one pull may take before the worker reads the files instead."""
    serve_from: Literal["auto", "device", "host"] = "auto"
    """Transport ``nccl``: where the learner keeps what it serves. ``device`` holds a copy of the
    published weights on the learner's GPU; ``host`` maps the files; ``auto`` takes the device when
    a quarter of its free memory holds them."""
    redis_url: Address = ""
    """A second Redis without AOF for transport ``redis``; empty: the main one, 64 MB at most."""
    canary: bool = True
    probe_sequences: int = Field(8, ge=1)
    probe_floor_mean: float | None = Field(None, gt=0)
    probe_floor_p99: float | None = Field(None, gt=0)
    """Floors of the probe's mean and 99th percentile log-prob gap, in nats. None: those of
    ``model.dtype``, see ``Config.probe_floors``."""


class EvalConfig(Section):
    """The fixed held-out set; evaluated before the first and after the last step."""

    prompts: int = Field(256, ge=0)
    seed: int = Field(987654321, ge=0)
    every_steps: int = Field(0, ge=0)
    """0: only first and last."""
    timeout_s: float = Field(300.0, gt=0)


class ObservabilityConfig(Section):
    """Logs, metrics, report."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    tensorboard: bool = True
    wandb: str = ""
    """Project of Weights & Biases that the figures also go to (``ringasync[wandb]``); the account
    and the mode come from its own environment variables. Empty: none."""
    traces: str = ""
    """OTLP/HTTP address that gets each rollout's life as a trace (``ringasync[traces]``), e.g.
    ``http://localhost:4318/v1/traces``. Empty: none."""
    traces_share: float = Field(1.0, gt=0, le=1)
    """Share of the groups whose rollouts are traced."""
    samples_keep: int = Field(64, ge=0)
    stall_report_s: float = Field(30.0, gt=0)


class MetricsConfig(Section):
    """Prometheus metrics of every role, see docs/metrics.md. Local: roles may differ in it."""

    host: str = "127.0.0.1"
    """Address that the ports listen on. Whoever reaches it reads the metrics: there is no login."""
    port: int = Field(0, ge=0, le=65000)
    """The coordinator's port; the learner has the next one, every worker and grader the first free
    one after that. 0: no metrics are served."""


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    redis: RedisConfig = RedisConfig()
    model: ModelConfig = ModelConfig()
    starter: StarterConfig = StarterConfig()
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    worker: WorkerConfig = WorkerConfig()
    grader: GraderConfig = GraderConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    eval: EvalConfig = EvalConfig()
    observability: ObservabilityConfig = ObservabilityConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        """Refuse pairs that cannot work together; all of them are named."""
        problems = impossible_pairs(self)
        if problems:
            raise ValueError("\n  ".join(problems))
        return self

    @property
    def probe_floors(self) -> tuple[float, float]:
        """Gaps (mean, 99th percentile; nats) below which no probe raises an alarm.

        Two engines in half precision disagree by 0.001 to 0.03 nats on average, the less the surer
        the model is, so the gap of earlier probes says little of the next one's; corrupted weights
        are off by one nat and more, and weights that were not applied are the read-back's to find.
        """
        mean, p99 = (1e-3, 1e-2) if self.model.dtype == "float32" else (0.1, 1.0)
        return self.weights.probe_floor_mean or mean, self.weights.probe_floor_p99 or p99

    @property
    def run_dir(self) -> Path:
        """Folder of this run: ``run.dir / run.name``."""
        return self.run.dir / self.run.name
