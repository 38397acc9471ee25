"""Every error that ringasync raises on purpose, in one tree, grouped by what the caller can do.

::

    RingError
    ├── ConfigError            fix the configuration file or the command line       exit 2
    ├── EnvironmentRefusedError  fix the machine: Redis, disk, versions             exit 3
    │   ├── BrokerUnreachableError
    │   ├── BrokerRefusedError      wrong policy, too old, wrong password
    │   └── JoinRefusedError        another schema, configuration or run
    ├── LockHeldError          another process has this role: wait or stop it       exit 4
    ├── FencedError            this process lost its right to act: start afresh     exit 5
    │   ├── SessionLostError
    │   └── IncarnationError
    ├── BadRecordError         one record is broken: quarantine it, go on
    │   ├── SchemaError
    │   └── BadPromptError
    ├── WeightError            do not generate with these weights
    │   ├── ManifestError
    │   ├── CanaryError
    │   ├── SwapFailedError
    │   ├── PeerError           the learner did not hand over its tensors: take the files
    │   └── TransportRefusedError
    ├── HandoverError          the workers did not leave the device: see who owes it  exit 8
    ├── EngineError            the inference engine is unusable: rebuild it or exit  exit 6
    ├── VerifierError          no verdict: retry, never a zero reward
    │   ├── VerifierTimeoutError
    │   └── VerifierCrashError
    ├── TrainingError          the step must not happen; names the rollout          exit 7
    │   ├── NonFiniteLogprobError
    │   └── StepMemoryError     memory did not suffice: change what it names, start again
    ├── JournalError           the learner's journal is damaged beyond its tail     exit 7
    ├── CheckpointError        a checkpoint is missing or unusable                  exit 7
    └── InvariantError         a bug in ringasync: please report it                 exit 70
"""

from __future__ import annotations

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
"""What taking apart a foreign JSON or msgpack value raises besides what a decoder says itself."""

MALFORMED_JSON = (*MALFORMED, RecursionError)
"""The same with the parsing: Python's gives up on deep nesting."""


class RingError(Exception):
    """Root of all deliberate errors; ``exit_code`` is what a role's process ends with."""

    exit_code = 1


class ConfigError(RingError):
    """A setting is wrong. The message names the key, the file, the rule and the remedy."""

    exit_code = 2


class EnvironmentRefusedError(RingError):
    """The surroundings do not allow a run; the message names the remedy."""

    exit_code = 3


class BrokerUnreachableError(EnvironmentRefusedError):
    """Redis did not answer within the retry budget."""


class BrokerRefusedError(EnvironmentRefusedError):
    """Redis answers but must not be used: eviction policy, version, password or persistence."""


class JoinRefusedError(EnvironmentRefusedError):
    """This role's schema or configuration differs from the run's."""


class LockHeldError(RingError):
    """The role is taken. ``owner`` and ``heartbeat_age_ms`` say by whom and how fresh."""

    exit_code = 4

    def __init__(self, role: str, owner: str, heartbeat_age_ms: int) -> None:
        self.role, self.owner, self.heartbeat_age_ms = role, owner, heartbeat_age_ms
        super().__init__(
            f"role {role!r} of this run is held by {owner} "
            f"(last heartbeat {heartbeat_age_ms} ms ago): wait, or stop that process first"
        )


class FencedError(RingError):
    """This process acted under a right that has passed to somebody else; nothing was changed."""

    exit_code = 5


class SessionLostError(FencedError):
    """The session expired: its leases belong to others now. Open a new session."""


class IncarnationError(FencedError):
    """Redis lost its tail; a new incarnation began. Open a new session."""


class BadRecordError(RingError):
    """One record cannot be used; it is quarantined and the run goes on."""


class SchemaError(BadRecordError):
    """A payload's schema is unknown, or its fields are missing, cut short or disagree."""


class BadPromptError(BadRecordError):
    """A prompt is empty, too long or not text."""


class WeightError(RingError):
    """A weight version must not be generated with."""


class ManifestError(WeightError):
    """A manifest is unreadable, or a shard does not match its checksum."""


class CanaryError(WeightError):
    """Live weights differ from the manifest (read-back) or answer differently (probe)."""


class SwapFailedError(WeightError):
    """The engine does not serve ``version`` as published; the engine is not to be trusted now."""

    def __init__(self, version: int, why: str) -> None:
        super().__init__(f"version {version}: {why}")
        self.version, self.why = version, why


class PeerError(WeightError):
    """A pull between learner and worker broke, timed out or was refused; the files remain."""


class TransportRefusedError(WeightError):
    """The transport cannot carry this model, e.g. too large for the ``redis`` transport."""


class EngineError(RingError):
    """The inference engine failed; its process or object must be rebuilt."""

    exit_code = 6


class HandoverError(RingError):
    """A worker did not leave the shared device in time; the message names it."""

    exit_code = 8


class VerifierError(RingError):
    """A verifier gave no verdict. Retried, then ``grade_error``; never a zero reward."""


class VerifierTimeoutError(VerifierError):
    """The verifier was killed at its time limit."""


class VerifierCrashError(VerifierError):
    """The verifier raised, died or exceeded its memory limit."""


class TrainingError(RingError):
    """The optimizer step must not happen."""

    exit_code = 7


class NonFiniteLogprobError(TrainingError):
    """The train engine gave NaN or infinity at a trained position; names the rollout."""


class StepMemoryError(TrainingError):
    """A training step ran out of memory. The process must end: of several ranks only this one
    knows, and the others wait for it within the step."""


class JournalError(RingError):
    """A journal record other than the torn tail fails its checksum."""

    exit_code = 7


class CheckpointError(RingError):
    """A checkpoint is absent, incomplete or belongs to another model."""

    exit_code = 7


class InvariantError(RingError):
    """Something that must always hold does not."""

    exit_code = 70
