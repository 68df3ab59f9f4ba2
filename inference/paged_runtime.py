"""The `Runtime`: a model's forward, and the paged memory of its keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from inference.attention import AttentionBackend
from inference.compiled_forward import CompiledForward
from inference.errors import ContextOverflow
from inference.fused_forward import FusedForward
from inference.kv_cache import AttentionGeometry, KVCache
from inference.kv_pool import KVPool
from inference.model_forward import ModelForward
from inference.packing import PackedBatch, pack
from inference.runtime import Chunk, Runtime, SequenceId
from inference.sampling import Draws, SamplingRow
from inference.step_graphs import Recorder, StepGraphs


class PagedRuntime(Runtime):
    """Packed ragged forward passes over a paged KV pool. See `Runtime` for the contract.

    `forward` runs the weights of `model`, which may be gone afterwards: only its shapes are asked for here.
    `max_context` is what the model was made for and is lowered to what the pool can hold. With a `recorder`, small
    steps of a fused forward run in fixed sizes that it has recorded (`step_graphs`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        forward: ModelForward,
        backend: AttentionBackend,
        geometry: AttentionGeometry,
        *,
        num_blocks: int,
        block_size: int,
        max_context: int,
        recorder: Recorder | None = None,
    ) -> None:
        self._forward = forward
        self._backend = backend
        self._device = model.device
        self._pool = KVPool(num_blocks, block_size)
        self._cache = KVCache(
            geometry, num_blocks, block_size, model.dtype, model.device, keys_by_dim=backend.keys_by_dim
        )
        self._vocab_size = _num_rows(model.get_output_embeddings())  # type: ignore[no-untyped-call]
        self._num_embeddings = _num_rows(model.get_input_embeddings())
        self._max_context = min(max_context, num_blocks * block_size)
        self._graphs = None if recorder is None else self._record(recorder)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_context(self) -> int:
        return self._max_context

    @property
    def num_free_tokens(self) -> int:
        return self._pool.num_free_blocks * self._pool.block_size

    @property
    def num_weight_bytes(self) -> int:
        """Memory of the weights."""
        return self._forward.num_weight_bytes

    @property
    def num_kv_bytes(self) -> int:
        """Memory of the KV pool, all of it allocated from the start."""
        return self._cache.num_bytes

    def open(self) -> SequenceId:
        return self._pool.open()

    def length(self, sequence: SequenceId) -> int:
        return self._pool.length(sequence)

    @torch.inference_mode()
    def forward(self, batch: Sequence[Chunk]) -> torch.Tensor:
        if not batch:
            return self._no_logits()
        with self._grown(batch):
            return self._run(batch)

    @torch.inference_mode()
    def draw_chains(
        self, batch: Sequence[Chunk], rows: Sequence[SamplingRow], depth: int, *, limit: int, num_runners_up: int
    ) -> Draws | None:
        if not isinstance(self._forward, CompiledForward) or not all(row.is_plain for row in rows):
            return None
        positions = [self._pool.length(chunk.sequence) + len(chunk.token_ids) for chunk in batch]
        with self._grown(batch, num_ahead=depth - 1):
            packed = pack(batch, self._pool, self._device, num_ahead=depth - 1)
            step = self._backend.plan(packed, self._cache)
            draws = self._forward.draw_chains(packed, step, rows, positions, depth, limit, num_runners_up)
        if draws is None:
            for chunk, position in zip(batch, positions, strict=True):
                self._pool.truncate(chunk.sequence, position - len(chunk.token_ids))
        return draws

    def truncate(self, sequence: SequenceId, length: int) -> None:
        self._pool.truncate(sequence, length)

    @torch.inference_mode()
    def fork(self, sequence: SequenceId) -> SequenceId:
        fork, copies = self._pool.fork(sequence)
        self._cache.copy_blocks(copies)
        return fork

    def free(self, sequence: SequenceId) -> None:
        self._pool.free(sequence)

    def check_integrity(self) -> None:
        """Check the KV pool's books, in time proportional to the pool; raises IntegrityError."""
        self._pool.check_integrity()

    @contextmanager
    def _grown(self, batch: Sequence[Chunk], num_ahead: int = 0) -> Iterator[None]:
        """The sequences have room for their chunks and ``num_ahead`` tokens more, unless what is done there fails."""
        self._check(batch, num_ahead)
        lengths = {chunk.sequence: self._pool.length(chunk.sequence) for chunk in batch}
        copies = self._pool.extend({chunk.sequence: len(chunk.token_ids) + num_ahead for chunk in batch})
        try:
            self._cache.copy_blocks(copies)
            yield
        except BaseException:
            # The device may run out of memory half way. What it wrote lies beyond the old lengths, so is never read.
            for sequence, length in lengths.items():
                self._pool.truncate(sequence, length)
            raise

    def _check(self, batch: Sequence[Chunk], num_ahead: int) -> None:
        if len({chunk.sequence for chunk in batch}) < len(batch):
            raise ValueError("a sequence appears twice in one batch: put its tokens in one chunk")
        for chunk in batch:
            if min(chunk.token_ids) < 0 or max(chunk.token_ids) >= self._num_embeddings:
                raise ValueError(f"sequence {chunk.sequence}: token ids must be in [0, {self._num_embeddings})")
            context = self._pool.length(chunk.sequence) + len(chunk.token_ids) + num_ahead
            if context > self._max_context:
                raise ContextOverflow(
                    f"sequence {chunk.sequence} would hold {context} tokens, the limit is {self._max_context}: "
                    "shorten the prompt or end the generation"
                )

    @torch.inference_mode()
    def _record(self, recorder: Recorder) -> StepGraphs | None:
        if not isinstance(self._forward, FusedForward):
            return None
        return StepGraphs(self._forward, self._cache, self._pool.num_free_blocks, recorder)

    def _run(self, batch: Sequence[Chunk]) -> torch.Tensor:
        recorded = None if self._graphs is None else self._graphs.run(batch, self._pool)
        return self._run_packed(pack(batch, self._pool, self._device)) if recorded is None else recorded

    def _run_packed(self, packed: PackedBatch) -> torch.Tensor:
        step = self._backend.plan(packed, self._cache)
        if packed.num_logits:
            return self._forward.run(packed, step)
        self._forward.run_without_logits(packed, step)
        return self._no_logits()

    def _no_logits(self) -> torch.Tensor:
        return torch.empty(0, self._vocab_size, dtype=torch.float32, device=self._device)


def _num_rows(embeddings: torch.nn.Module) -> int:
    """Tokens of an embedding or an LM head."""
    weight = embeddings.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]
