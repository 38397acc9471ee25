"""Log-probs of single tokens without an array of all positions times the vocabulary.

The body of the model runs once and leaves one hidden state a position. The LM head and its
log-softmax then run over chunks of those positions that are wanted, and each chunk is computed
again in the backward pass, so that logits of one chunk at most are alive at any time.

Shape legend: B rows, L padded length, N wanted positions, V vocabulary, H hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, Protocol

import structlog
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from learner.algorithms.extra_losses import entropy as entropy_of
from learner.backends.collate import Positions
from learner.backends.compiled import compiled_program

_Entropy = Literal["none", "value", "gradient"]
_ENTROPY_MAX_VOCAB = 8192
"""Above this vocabulary the entropy would cost another array of the logits' size."""
_PROBE_TOKENS = 8
_HARMLESS = {"input_ids", "use_cache", "return_dict", "logits_to_keep"}
"""Arguments of the body that do not change what it computes of ``input_ids``."""


class Scores(Protocol):
    """What scores tokens: ``TokenScores``, or a sharded model's own way to it."""

    @property
    def chunk_tokens(self) -> int:
        """Positions whose logits are in memory at once; 0: all of them."""
        ...

    def score(
        self,
        wanted: Positions,
        temperature: float,
        *,
        entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See ``TokenScores.score``."""
        ...

    def logits(self, wanted: Positions) -> Tensor:
        """See ``TokenScores.logits``."""
        ...


class TokenScores:
    """Scores tokens under a causal LM, in chunks of ``chunk_tokens`` positions (0: all at once).

    A model whose logits are more than its LM head of its body's last hidden states (a softcap, a
    scale) is scored all at once whatever ``chunk_tokens`` says; the log tells so, once.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, chunk_tokens: int, *, compiled: bool = False
    ) -> None:
        """``dtype``: bfloat16 runs the model under autocast. ``compiled``: the log-softmax is one
        program that makes no float32 copy of the logits."""
        self._log_softmax: Callable[..., tuple[Tensor, Tensor]] = (
            compiled_program(_scores) if compiled else _scores
        )
        self._model = model
        self._dtype = dtype
        self._body: Any = getattr(model, "base_model", model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.chunk_tokens = 0
        """As it is done: 0 where the model does not allow more."""
        if chunk_tokens:
            place = next(model.parameters()).device
            with torch.autocast(place.type, torch.bfloat16, enabled=self._low):
                why = head_problem(model, place)
            if not why:
                self.chunk_tokens = chunk_tokens
                return
            structlog.get_logger(__name__).warning(
                "learner.logprob_chunk_tokens has no effect: all logits are computed at once",
                model=type(model).__name__,
                why=why,
            )

    def score(
        self,
        wanted: Positions,
        temperature: float,
        *,
        entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs fp32 [N] of ``wanted.targets``, with gradient when that is enabled, and entropy
        fp32 [N], NaN where not asked for or where the vocabulary is too large for it.

        ``entropy_gradient``: entropy for any vocabulary, with gradient; that takes two more arrays
        of a chunk's logits while the chunk is worked on.
        """
        kind: _Entropy = "gradient" if entropy_gradient else "value" if entropy else "none"
        if not self.chunk_tokens:
            logits = self.logits(wanted)
            return self._log_softmax(logits, wanted.targets, temperature, kind)
        with torch.autocast(wanted.input_ids.device.type, torch.bfloat16, enabled=self._low):
            output = self._body(**wanted.inputs)
        hidden: Tensor = output.last_hidden_state[wanted.rows, wanted.columns]
        chunks = _chunks(hidden, wanted, self.chunk_tokens)
        # One chunk alone is no larger when it is kept: nothing is computed again for it.
        again = torch.is_grad_enabled() and len(chunks) > 1
        parts: list[tuple[Tensor, Tensor]] = []
        for states, targets in chunks:
            chunk = (states, targets, temperature, kind)
            if again:
                # There is nothing random in a head, so no generator's state need be restored.
                parts.append(
                    checkpoint(
                        self._score_states, *chunk, use_reentrant=False, preserve_rng_state=False
                    )
                )
            else:
                parts.append(self._score_states(*chunk))
        return torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])

    def logits(self, wanted: Positions) -> Tensor:
        """Logits [N, V] at the given places; columns outside them are not computed."""
        device, columns = wanted.input_ids.device, wanted.columns
        extra: dict[str, Any] = {}
        if self._keeps_logits and wanted.packing is not None:
            extra["logits_to_keep"] = columns
            columns = torch.arange(columns.shape[0], device=device)
        elif self._keeps_logits:
            first, last = int(columns.min()), int(columns.max())
            extra["logits_to_keep"] = torch.arange(first, last + 1, device=device)
            columns = columns - first
        with torch.autocast(device.type, torch.bfloat16, enabled=self._low):
            output = self._model(**wanted.inputs, **extra)
        logits: Tensor = output.logits[wanted.rows, columns]
        return logits

    @property
    def _low(self) -> bool:
        return self._dtype != torch.float32

    def _score_states(
        self, hidden: Tensor, targets: Tensor, temperature: float, kind: _Entropy
    ) -> tuple[Tensor, Tensor]:
        # Without autocast's cache each chunk has its own cast of the weight, so that the gradients
        # of the chunks are added up in the float32 of the master and not in bfloat16.
        device = hidden.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self._low, cache_enabled=False):
            logits = self._model.get_output_embeddings()(hidden)  # type: ignore[operator]
        return self._log_softmax(logits, targets, temperature, kind)


def _chunks(hidden: Tensor, wanted: Positions, size: int) -> list[tuple[Tensor, Tensor]]:
    """``hidden`` [N, H] and its targets in parts of ``size``, with as many empty ones behind them
    as the widest of the ranks has more: a head of sharded weights is gathered for each."""
    count = max(1, -(-max(hidden.shape[0], wanted.widest) // size))
    bounds = [(at * size, (at + 1) * size) for at in range(count)]
    return [(hidden[begin:end], wanted.targets[begin:end]) for begin, end in bounds]


@torch.no_grad()
def head_problem(model: Any, device: torch.device) -> str:
    """Why the logits of ``model`` are not LM head (last hidden state of its body); empty if so.

    Seen in one forward of a few tokens on ``device``, bit for bit, so that whatever a model does
    besides shows, known here or not.
    """
    find_head = getattr(model, "get_output_embeddings", None)
    head, body = find_head() if find_head else None, getattr(model, "base_model", model)
    if head is None or body is model:
        return "it has no LM head apart from its body"
    seen: dict[str, Any] = {"head": [], "body": []}
    with ExitStack() as hooks:
        for name, module in (("head", head), ("body", body)):
            handle = module.register_forward_hook(
                lambda _module, args, kwargs, output, name=name: seen[name].append(
                    (args, kwargs, output)
                ),
                with_kwargs=True,
            )
            hooks.callback(handle.remove)
        input_ids = torch.arange(_PROBE_TOKENS, device=device)[None] % head.weight.shape[0]
        logits = model(input_ids=input_ids, use_cache=False).logits
    if len(seen["head"]) != 1 or len(seen["body"]) != 1:
        return "its forward does not run body and LM head once each"
    (head_args, _, head_output), (args, kwargs, output) = seen["head"][0], seen["body"][0]
    extra = {name for name, value in kwargs.items() if value is not None and value is not False}
    if args or extra - _HARMLESS:
        return f"its body is given more than token ids: {sorted(extra - _HARMLESS)}"
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or not head_args or not torch.equal(head_args[0], hidden):
        return "its LM head is not given the last hidden states as they are"
    if not torch.equal(logits, head_output):
        return "its logits are changed after the LM head (a scale or a softcap)"
    return ""


def _scores(
    logits: Tensor, targets: Tensor, temperature: float, kind: _Entropy
) -> tuple[Tensor, Tensor]:
    """Log softmax(``logits`` [N, V] / temperature) at ``targets`` [N], and entropy [N], fp32."""
    logits = logits.float() / temperature
    chosen: Tensor = logits.gather(-1, targets[:, None]).squeeze(-1)
    logprobs = chosen - torch.logsumexp(logits, dim=-1)
    if kind == "gradient":
        return logprobs, entropy_of(logits)
    # Last, and without gradient: a chunk computed again stops before it comes here.
    with torch.no_grad():
        if kind == "none" or logits.shape[-1] > _ENTROPY_MAX_VOCAB:
            return logprobs, torch.full_like(logprobs, float("nan"))
        return logprobs, entropy_of(logits)
