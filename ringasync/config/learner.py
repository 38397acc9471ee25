"""The settings of the learner."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ringasync.config.section import DEVICE_PATTERN, Section


class LearnerConfig(Section):
    """The learner: optimizer, length of the run, durability."""

    backend: Literal["torch", "deepspeed"] = "torch"
    """What trains: ``torch``, on several ranks sharded by FSDP2, or ``deepspeed``. A run may go on
    with the other, see docs/learner-deepspeed.md."""
    steps: int = Field(200, ge=1)
    lr: float = Field(1e-3, ge=0)
    warmup_steps: int = Field(5, ge=0)
    """Optimizer updates of linear warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up. What falls does so over ``steps`` x ``updates_per_batch`` updates."""
    lr_min_ratio: float = Field(0.0, ge=0, le=1)
    """``linear``, ``cosine``: the share of ``lr`` that they end at."""
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's, on matrices only. Ring-1T: 0.01; Ring-lite: not given."""
    grad_clip: float = Field(1.0, gt=0)
    grad_spike_factor: float = Field(5.0, ge=0)
    """A gradient norm above this x the median of the last ones is reported. 0: none is."""
    grad_spike_window_steps: int = Field(32, ge=1)
    """How many norms that median is of."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer steps a batch; above 1 the proximal pass is run."""
    microbatch_tokens: int = Field(16384, ge=1)
    """What one forward holds. A sequence above it is alone in its micro-batch."""
    packing: Literal["auto", "varlen", "sequences", "off"] = "auto"
    """How micro-batches are laid out. ``off``: rows padded to the longest. Else sequences stand one
    behind the other without padding, and attention runs by one kernel for all (``varlen``: bfloat16
    on CUDA) or one sequence after the other (``sequences``); ``auto`` takes the first where it
    can be had. Models that cannot be packed are padded all the same; the log tells why."""
    attention_kernel: Literal["auto", "torch", "flash4"] = "auto"
    """What runs the attention of packed rows on CUDA. ``flash4``: FlashAttention 4 (extra `flash`,
    Hopper and newer), if it gives torch's numbers; ``auto``: that where it is installed."""
    activation_checkpointing: bool = False
    """Keep only the input of each layer for the backward pass, which then runs the layer again: a
    third more work, and memory for long rollouts."""
    compile: bool = False
    """torch.compile of layers and log-softmax. The first steps take a minute or so longer; needs a
    C compiler."""
    residual_dtype: Literal["float32", "model"] = "float32"
    """What goes from layer to layer where ``model.dtype`` is bfloat16. ``model``: that, as in the
    inference engines, with less memory and traffic. ``float32``: finer sums than theirs."""
    logprob_chunk_tokens: int = Field(1024, ge=0)
    """Positions whose logits are in memory at once; a training step computes them twice where a
    micro-batch has more trained tokens. 0: those of a whole micro-batch, each once."""
    freeze_router: Literal["none", "bias", "all"] = "none"
    """MoE: what of the routers gets no updates. ``bias``: the selection bias, as Ring-1T does;
    ``all``: the whole router. Frozen parts are saved and published all the same."""
    device: str = Field("auto", pattern=DEVICE_PATTERN)
    """Where the train engine runs; ``cuda:1`` leaves ``cuda:0`` to a worker of the same host.
    ``CUDA_VISIBLE_DEVICES`` of the process does it too: devices are counted among the visible."""
    threads: int = Field(1, ge=1)
    ranks: int = Field(1, ge=1)
    """Processes that train together, on a GPU each, with ``threads`` threads each; of several nodes
    each starts its share. Above 1 every rank holds a shard of weights, gradients and moments
    (FSDP2), see docs/learner-ranks.md. It may change between two lives of a run."""
    zero_stage: int | None = Field(None, ge=0, le=3)
    """``deepspeed``: what the ranks share out. 0: nothing; 1: the optimizer's state; 2: gradients,
    too; 3: weights, too. Left out: 1. It may change between two lives of a run, as the next."""
    offload_optimizer: bool = False
    """``deepspeed``, stage 1 to 3: keep the optimizer's state, and step, in main memory."""
    peak_tflops: float = Field(0.0, ge=0)
    """What the device can do at most, in TFLOP/s, for the metric ``mfu``. 0: that of a GPU known by
    name (H100, H200: 989, dense bf16); on others there is no ``mfu``."""
    publish_async: bool = True
    """``schedule.mode = "pipelined"``: write new weights, hand them over and announce them while
    the next batch is assembled and trained, which waits only until they are copied in main memory
    and the canary's probe is scored. The copy takes as much of it as a version is large."""
    checkpoint_every_steps: int = Field(20, ge=1)
    checkpoint_async: bool = True
    """Write checkpoints while the next steps are trained: training stops only until the state is
    copied in main memory. That takes as much of it as model and optimizer state are large."""
    checkpoint_keep: int = Field(2, ge=1)
    export_every_versions: int = Field(0, ge=0)
    """Every version whose number is a multiple of this stays as an HF-format folder in
    ``runs/NAME/exports``, from the published files. 0: none; `ringasync export` makes one."""
    keep_exports: int = Field(0, ge=0)
    """How many of the newest exports stay. 0: all."""
    lock_ttl_ms: int = Field(5000, ge=200)
    stall_report_s: float = Field(30.0, gt=0)

    @property
    def zero_stage_of_deepspeed(self) -> int:
        """``zero_stage`` where it is left out, too."""
        return 1 if self.zero_stage is None else self.zero_stage
