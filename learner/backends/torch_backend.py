"""The plain torch train engine: AdamW, fp32 master weights; one process, or shards by FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import compress, repeat
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from learner.algorithms.metrics import concatenate
from learner.algorithms.mismatch import MismatchWeights, make_mismatch
from learner.algorithms.schedule import learning_rate
from learner.backends.accumulation import Accumulation, backward, no_step
from learner.backends.base import ScoredSequence, StepResult
from learner.backends.collate import (
    MicroBatch,
    Positions,
    collate,
    pad_rows,
    plan_microbatches,
)
from learner.backends.compiled import compilation_explained
from learner.backends.experts import use_autocast_experts
from learner.backends.exporter import WeightExporter
from learner.backends.extra_terms import ExtraTerms, FixedInputs, TermTotals
from learner.backends.heads import use_float32_head
from learner.backends.layers import prepare_layers, use_residual_dtype
from learner.backends.memory import memory_explained
from learner.backends.packing import choose_packing, use_packed_attention
from learner.backends.pretrained import load_causal_lm
from learner.backends.ranks import Ranks
from learner.backends.routers import freeze_routers
from learner.backends.routing_replay import replayed_routing, require_routers
from learner.backends.settings import TorchSettings as TorchSettings
from learner.backends.sharding import RankGroup, placements, shard
from learner.backends.step_timer import StepTimer
from learner.backends.tensor_files import TensorSaver, read_shards, read_tensors
from learner.backends.token_scores import Scores, TokenScores
from learner.backends.torch_state import (
    check_state,
    export_state,
    import_state,
    make_optimizer,
    move_state,
)
from learner.batch import TrainBatch
from learner.devices import release_cuda_caches, resolve_device
from ringasync.errors import CheckpointError, NonFiniteLogprobError
from ringasync.runtime import crashpoints

_HOST = torch.device("cpu")


class TorchBackend:
    """``Backend`` on a Hugging Face causal LM in this process, or on this rank's shards of one."""

    def __init__(
        self,
        model: nn.Module,
        settings: TorchSettings,
        source: str = "",
        group: RankGroup | None = None,
    ) -> None:
        """Take a loaded ``model``; ``source`` is the folder its tokenizer files are copied from.

        With a ``group`` each of its ranks makes the same calls, and holds a shard of all state.
        """
        self._settings = settings
        self._ranks = Ranks() if group is None else group.ranks
        self._device = resolve_device(settings.learner.device) if group is None else group.device
        home = _HOST if settings.begin_offloaded or group is not None else self._device
        self._model = model.to(device=home, dtype=torch.float32)
        self._model.eval()  # dropout would falsify log-probs; gradients flow all the same
        layout, kernel = settings.learner.packing, settings.learner.attention_kernel
        self._packing = choose_packing(self._model, layout, self._device, settings.dtype, kernel)
        self._terms = ExtraTerms(
            self._model, settings.loss, self._prepare, settings.dtype, settings.learner
        )
        self._prepare(self._model)
        if settings.loss.routing_replay:
            require_routers(self._model)
        freeze_routers(self._model, settings.learner.freeze_router)
        self._vocab = int(self._model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        self._backward: Callable[[Tensor, bool], None] = backward
        chunk, compiled = settings.learner.logprob_chunk_tokens, settings.learner.compile
        # Their probe of the head runs on the whole model.
        scores = TokenScores(self._model, settings.dtype, chunk, compiled=compiled)
        self._scores: Scores = self._distribute(scores, group)
        self._updates = 0
        saving, exporting = (None, None) if group is None else (group.saving, group.exporting)
        self._saver = TensorSaver(saving)
        self._exporter = WeightExporter(settings.dtype, source, self._ranks, exporting)
        self._mismatch: MismatchWeights = make_mismatch(
            settings.loss.mismatch,
            mask_low=settings.loss.mask_low,
            mask_high=settings.loss.mask_high,
            tis_cap=settings.loss.tis_cap,
            kpop_phi=settings.loss.kpop_phi,
        )
        self._accumulation = Accumulation(
            self._model,
            # Not a method: a backend in a circle would keep its memory until the collector comes.
            partial(_score_trained, self._scores, settings),
            self._terms,
            self._mismatch,
            settings.loss,
            self._ranks.size,
            self._backward,
        )

    def _distribute(self, scores: TokenScores, group: RankGroup | None) -> Scores:
        """Shard the prepared model over the ranks, if there are several; make its optimizer.
        Returns what scores it from then on."""
        found: Scores = scores
        if group is not None:
            found = shard(self._model, scores, group)
            self._terms.move(self._device)
        self._params = [each for each in self._model.parameters() if each.requires_grad]
        self._optimizer = make_optimizer(
            self._params, self._settings.learner, fused=self._device.type == "cuda"
        )
        return found

    def _prepare(self, model: nn.Module) -> None:
        """Let the forwards of a loaded model be those of the settings."""
        learner = self._settings.learner
        use_autocast_experts(model)
        if self._packing is not None:
            use_packed_attention(model)
        prepare_layers(
            model, checkpointing=learner.activation_checkpointing, compiled=learner.compile
        )
        if learner.residual_dtype == "model":
            use_residual_dtype(model, self._settings.dtype)
        if self._settings.head_dtype == "float32" and self._settings.dtype != torch.float32:
            use_float32_head(model, self._settings.dtype)

    @classmethod
    def from_pretrained(
        cls, path: str, settings: TorchSettings, group: RankGroup | None = None
    ) -> TorchBackend:
        """Load any HF causal LM folder or hub name. Raises ``TrainingError`` when it cannot be."""
        torch.manual_seed(settings.seed)
        return cls(load_causal_lm(path), settings, source=path, group=group)

    @property
    def model(self) -> nn.Module:
        """The live module."""
        return self._model

    @property
    def updates(self) -> int:
        """Optimizer updates so far."""
        return self._updates

    def train_batch(self, batch: TrainBatch) -> StepResult:
        """See ``Backend.train_batch``. One update needs no proximal pass: theta_old is the present
        forward, detached; with more, log-probs are taken once before the first update."""
        learner, loss = self._settings.learner, self._settings.loss
        whole = collate(
            batch,
            microbatch_tokens=learner.microbatch_tokens,
            normalizer=loss.normalizer,
            routing=loss.routing_replay,
            packing=self._packing,
            ranks=self._ranks.size,
        )
        own, real = self._ranks.share(whole)
        timer = StepTimer(self._device)
        with memory_explained(learner, own), compilation_explained():
            micro_batches = [micro.to(self._device) for micro in own]
            proximal: list[Tensor] | None = None
            if learner.updates_per_batch > 1:
                with torch.no_grad(), timer.part("forward"):
                    proximal = self._proximal(micro_batches)
            temperature = self._settings.temperature
            fixed = self._terms.prepare_batch(micro_batches, temperature, self._ranks, real)
            results = [
                self._update(micro_batches, proximal, fixed, timer, real)
                for _ in range(learner.updates_per_batch)
            ]
        return replace(
            results[0],
            lr=results[-1].lr,
            updates=len(results),
            tokens=results[-1].tokens,
            seconds=timer.seconds(),
        )

    def _proximal(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        logprobs = []
        for micro in micro_batches:
            with replayed_routing(self._model, micro.routed_experts):
                logprobs.append(self._accumulation.score(micro)[0])
        self._require_finite(micro_batches, logprobs)
        return logprobs

    def _update(
        self,
        micro_batches: Sequence[MicroBatch],
        proximal: Sequence[Tensor] | None,
        fixed: Sequence[FixedInputs],
        timer: StepTimer,
        real: Sequence[bool] | None = None,
    ) -> StepResult:
        self._begin_update()
        terms = TermTotals(lambda: torch.zeros((), dtype=torch.float64, device=self._device))
        # Nothing in this loop waits for the device: what is to be read of it is read after it.
        done = [
            self._accumulation.add(
                micro,
                None if proximal is None else proximal[index],
                fixed[index],
                terms,
                timer,
                is_last=index == len(micro_batches) - 1,
            )
            for index, micro in enumerate(micro_batches)
        ]
        try:
            self._require_finite(micro_batches, [one.policy for one in done])
        except NonFiniteLogprobError:
            self._drop_gradients()
            raise
        with timer.part("optimizer"):
            lr = self._next_lr()
            grad_norm = self._step(lr) if done else 0.0
        self._updates += 1
        own = [float(sum(one.loss.double() for one in done)), *map(float, terms.values())]
        total, *sums = self._ranks.sum(own)
        counted = [one.stats() for one in compress(done, real or repeat(True))]
        tokens = self._ranks.join_stats(concatenate(counted))
        return StepResult(total, grad_norm, lr, 1, tokens, dict(zip(terms, sums, strict=True)))

    def _require_finite(
        self, micro_batches: Sequence[MicroBatch], logprobs: Sequence[Tensor]
    ) -> None:
        """Raises ``NonFiniteLogprobError`` on all ranks when one has a log-prob that is NaN or
        infinite."""
        problem: NonFiniteLogprobError | None = None
        finite = [torch.isfinite(one).all() for one in logprobs]
        if finite and not bool(torch.stack(finite).all()):
            found = map(MicroBatch.nonfinite, micro_batches, logprobs, repeat("the train engine"))
            problem = next(one for one in found if one is not None)
        self._ranks.agree(problem)

    def _step(self, lr: float) -> float:
        """Step with the gradients that were added up; returns their norm before clipping.

        Raises ``TrainingError`` where it is not finite: then nothing is changed.
        """
        norm = self._clip_gradients()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        crashpoints.reach("stepping", self._updates)
        self._optimizer.step()
        self._drop_gradients()
        return norm

    def _begin_update(self) -> None:
        self._drop_gradients()  # those of an update that broke off

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _next_lr(self) -> float:
        learner = self._settings.learner
        return learning_rate(
            learner.lr,
            warmup_updates=learner.warmup_steps,
            updates_done=self._updates,
            schedule=learner.lr_schedule,
            total_updates=learner.steps * learner.updates_per_batch,
            min_ratio=learner.lr_min_ratio,
        )

    def _clip_gradients(self) -> float:
        whole = nn.utils.clip_grad_norm_(self._params, self._settings.learner.grad_clip)
        norm = float(whole.full_tensor() if isinstance(whole, DTensor) else whole)
        if not np.isfinite(norm):
            self._drop_gradients()
            raise no_step(norm)
        return norm

    def logprobs(
        self, sequences: Sequence[ScoredSequence], *, temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        """See ``Backend.logprobs``."""
        results = [np.zeros(0, np.float32) for _ in sequences]
        wanted = [index for index, one in enumerate(sequences) if one.token_ids]
        sizes = [len(sequences[i].prompt_ids) + len(sequences[i].token_ids) for i in wanted]
        for chosen in plan_microbatches(sizes, self._settings.learner.microbatch_tokens):
            places = [wanted[index] for index in chosen]
            scored = self._score([sequences[place] for place in places], temperature)
            for place, values in zip(places, scored, strict=True):
                results[place] = values
        return results

    @torch.no_grad()
    def _score(
        self, sequences: Sequence[ScoredSequence], temperature: float
    ) -> list[npt.NDArray[np.float32]]:
        counts = [len(one.token_ids) for one in sequences]
        rows = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        columns = torch.cat(
            [torch.arange(len(s.token_ids)) + len(s.prompt_ids) - 1 for s in sequences]
        )
        targets = torch.tensor([token for one in sequences for token in one.token_ids])
        ids = pad_rows([one.prompt_ids + one.token_ids for one in sequences])
        ids, rows, columns, targets = (
            one.to(self._device) for one in (ids, rows, columns, targets)
        )
        wanted = Positions(ids, rows, columns, targets)
        values, _ = self._scores.score(wanted, temperature)
        return [part.cpu().numpy() for part in torch.split(values, counts)]

    @torch.no_grad()
    def sample(self, num_sequences: int, num_tokens: int, seed: int) -> list[ScoredSequence]:
        """See ``Backend.sample``: a random first token, then the policy's own at T = 1."""
        generator = torch.Generator(device="cpu").manual_seed(seed)
        ids = torch.randint(0, self._vocab, (num_sequences, 1), generator=generator)
        rows = torch.arange(num_sequences, device=self._device)
        for length in range(1, num_tokens + 1):
            columns = torch.full_like(rows, length - 1)
            wanted = Positions(ids.to(self._device), rows, columns, rows)
            logits = self._scores.logits(wanted).float()
            chosen = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)
            ids = torch.cat([ids, chosen], dim=1)
        return [ScoredSequence((int(row[0]),), tuple(row[1:].tolist())) for row in ids]

    def state_dict(self) -> dict[str, Tensor]:
        """All state by flat name (see ``tensor_files``). The tensors may alias live state."""
        state = export_state(self._model, self._optimizer, self._updates, self._device)
        # Nothing is drawn from torch's generators in training, so one rank's stand for all.
        return {
            name: tensor
            for name, tensor in state.items()
            if self._ranks.rank == 0 or isinstance(tensor, DTensor)
        }

    def begin_save(self, directory: Path) -> Future[None]:
        """See ``Backend.begin_save``."""
        return self._saver.begin(self.state_dict(), directory)

    def load(self, directory: Path) -> None:
        """See ``Backend.load``."""
        if self._ranks.size == 1:
            state = read_tensors(directory)
            self._updates = import_state(self._model, self._optimizer, state, self._device)
            return
        problem: CheckpointError | None = None
        try:
            state = read_shards(directory, placements(self._model))
            check_state(self._model, state)
        except CheckpointError as error:
            problem = error
        self._ranks.agree(problem)
        self._updates = import_state(self._model, self._optimizer, state, self._device)

    def offload(self) -> None:
        """See ``Backend.offload``. Of CUDA its context stays, which no process can leave alive."""
        self._optimizer.zero_grad(set_to_none=True)
        move_state(self._model, self._optimizer, _HOST)
        self._terms.move(_HOST)
        if self._device.type == "cuda":
            release_cuda_caches()

    def onload(self) -> None:
        """See ``Backend.onload``."""
        move_state(self._model, self._optimizer, self._device)
        self._terms.move(self._device)

    def save_hf(self, directory: Path) -> None:
        """See ``Backend.save_hf``; tokenizer files are copied from the starting model's folder."""
        self._exporter.save(self._model, directory)

    def begin_export(self, directory: Path) -> Future[None]:
        """See ``Backend.begin_export``."""
        return self._exporter.begin(self._model, directory)


def _score_trained(
    scores: Scores, settings: TorchSettings, micro: MicroBatch
) -> tuple[Tensor, Tensor]:
    """Log-probs fp32 [N] (with gradient when enabled) and entropy [N] of the trained tokens."""
    return scores.score(
        micro.positions,
        settings.temperature,
        entropy=True,
        entropy_gradient=settings.loss.entropy_coef != 0,
    )
