"""What is published beside a set of weights: the manifest with checksums and the canary."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ringasync import SCHEMA_VERSION


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_Frozen):
    """One published piece: a file or a run of Redis chunks."""

    name: str
    size_bytes: int = Field(ge=0)
    xxh3_128: str


class TensorInfo(_Frozen):
    """One named tensor: HF name, shape, dtype as in safetensors, and the digest of its bytes.

    ``digest`` is xxh3_128 over the tensor's contiguous little-endian bytes in the published dtype.
    Read-back recomputes it from the engine's live parameters.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    digest: str


class ProbeSequence(_Frozen):
    """On-policy tokens with the learner's log-probs under the published weights at T = 1.

    ``token_ids`` are the last ``len(logprobs)`` tokens scored after ``prompt_ids``.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class PeerOffer(_Frozen):
    """Where the learner serves this version's tensors to workers of its own host.

    Announced through the broker only, never written beside the files: ``secret`` lets its holder
    pull the version. ``host_id`` tells whether ``port`` on loopback means the same machine.
    ``timeout_s`` is how long one whole pull may take; both sides keep to it.
    """

    host_id: str
    port: int = Field(ge=1, le=65535)
    secret: str = Field(repr=False)
    timeout_s: float = Field(gt=0)


class WeightManifest(_Frozen):
    """Everything a worker needs to fetch, check and believe one policy version.

    A version is (number, learner step, fork): ``policy_version`` is never reused, ``learner_step``
    is what staleness is counted in, ``fork_step`` the step of the checkpoint this life of the
    learner started from. ``fence`` is the learner's fencing token.
    """

    schema_version: int = SCHEMA_VERSION
    run: str
    policy_version: int = Field(ge=1)
    learner_step: int = Field(ge=0)
    fork_step: int = Field(ge=0)
    fence: int = Field(ge=0)
    transport: Literal["file", "redis"]
    location: str
    shards: tuple[ShardInfo, ...]
    tensors: tuple[TensorInfo, ...]
    probe: tuple[ProbeSequence, ...] = ()
    created_ms: int = 0
    peer: PeerOffer | None = None
