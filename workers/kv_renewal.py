"""``kv = "rolling"``: after a swap, requests are computed anew a few at a time. Pure data, no I/O.

::

    submitted ──► known ── a swap ──► due ── wave ──► renewing ── first token ──► known
                    ▲                                                               │
                    └───────────────────────────────────────────────────────────────┘

A request that is due goes on with keys and values of older weights until its turn. Then it is
taken out of the engine and submitted again with all its tokens as context, as a resumed rollout is.
So a rollout waits for the prefill of its own wave, and not for that of all rollouts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from workers.engines.base import GenerationRequest, TokenChunk


@dataclass(slots=True)
class _Known:
    """A request in the engine, and what it has sampled since it was submitted."""

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)

    @property
    def context_tokens(self) -> int:
        request = self.request
        return len(request.prompt_ids) + len(request.prefix_ids) + len(self.tokens)


class KvRenewal:
    """Which requests of an engine still have the KV of older weights."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._due: dict[str, None] = {}
        self._renewing: set[str] = set()
        self.settled = asyncio.Event()
        """Every request of the last wave has a token of its own KV, or is gone."""
        self.settled.set()

    @property
    def due(self) -> int:
        """Requests that wait for their turn."""
        return len(self._due)

    def submitted(self, requests: Iterable[GenerationRequest]) -> None:
        """The engine has these now; their KV is of the present weights."""
        for request in requests:
            self._known[request.request_id] = _Known(request)
            self._due.pop(request.request_id, None)

    def absorb(self, chunks: Iterable[TokenChunk]) -> None:
        """Take what was sampled."""
        if not self._known:  # none is followed where the engine recomputes by itself
            return
        for chunk in chunks:
            known = self._known.get(chunk.request_id)
            if known is None:
                continue
            known.tokens += chunk.token_ids
            if chunk.finish is not None:
                self.gone([chunk.request_id])
            elif chunk.token_ids:
                self._settle(chunk.request_id)

    def gone(self, request_ids: Iterable[str]) -> None:
        """These are not in the engine any more."""
        for request_id in request_ids:
            self._known.pop(request_id, None)
            self._due.pop(request_id, None)
            self._settle(request_id)

    def swapped(self) -> None:
        """Other weights: every request that has any KV is due, those that came first first."""
        self._due = dict.fromkeys(self._known)

    def wave(self, limit_tokens: int) -> list[str]:
        """The next requests to renew: at least one, if any is due, and further ones as long as
        the context of all is within ``limit_tokens``."""
        chosen: list[str] = []
        total = 0
        for request_id in self._due:
            total += self._known[request_id].context_tokens
            if chosen and total > limit_tokens:
                break
            chosen.append(request_id)
        return chosen

    def renewed(self, request_ids: Sequence[str]) -> list[GenerationRequest]:
        """What to submit for those of a wave that did not end meanwhile; call it when they have
        left the engine and all their tokens were absorbed."""
        requests = []
        for request_id in request_ids:
            known = self._known.get(request_id)
            if known is None:
                continue
            request = known.request
            requests.append(
                replace(
                    request,
                    prefix_ids=(*request.prefix_ids, *known.tokens),
                    max_new_tokens=request.max_new_tokens - len(known.tokens),
                )
            )
        self._renewing = {request.request_id for request in requests}
        if self._renewing:
            self.settled.clear()
        return requests

    def clear(self) -> None:
        """There is no engine."""
        self._known.clear()
        self._due.clear()
        self._renewing.clear()
        self.settled.set()

    def _settle(self, request_id: str) -> None:
        self._renewing.discard(request_id)
        if not self._renewing:
            self.settled.set()
