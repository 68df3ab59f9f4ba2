"""The books of the paged KV pool: which sequence holds which blocks. No tensor in sight.

A block holds `block_size` consecutive positions of a sequence. A sequence's table lists its blocks in order: block
`table[i]` holds positions [i * block_size, (i + 1) * block_size). Forks share blocks by reference count.

The rule that keeps forks apart: **a block with more than one holder is read-only.** `fork` shares only full blocks and
copies a partial last one. A rollback may then cut a sequence back *into* a shared block; such a block stays shared,
and is copied when the sequence next grows into it. Copies are returned to the caller, who owns the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from inference.errors import IntegrityError, OutOfKVBlocks, UnknownSequence
from inference.free_blocks import FreeBlocks
from inference.runtime import SequenceId


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The content of block `source` must be copied to block `target` before anything is written to either."""

    source: int
    target: int


@dataclass(slots=True)
class _Table:
    blocks: list[int] = field(default_factory=list)
    length: int = 0


class KVPool:
    """Block tables of all sequences over `num_blocks` blocks of `block_size` positions each."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a KV pool needs blocks of at least one token, got {num_blocks} blocks of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = FreeBlocks(num_blocks)
        self._num_holders = [0] * num_blocks
        self._tables: dict[SequenceId, _Table] = {}
        self._next_id = 0

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    def open(self) -> SequenceId:
        """A new empty sequence."""
        sequence = SequenceId(self._next_id)
        self._next_id += 1
        self._tables[sequence] = _Table()
        return sequence

    def length(self, sequence: SequenceId) -> int:
        return self._table(sequence).length

    def blocks(self, sequence: SequenceId) -> list[int]:
        """The sequence's own block table: read it, do not change it."""
        return self._table(sequence).blocks

    def extend(self, growth: Mapping[SequenceId, int]) -> list[BlockCopy]:
        """Grow each sequence by a number of positions, all of them or none.

        Returns:
            Copies to make before the new positions are written.

        Raises:
            OutOfKVBlocks, UnknownSequence: before any state changes.
        """
        needed = sum(self._num_blocks_to_grow(self._table(sequence), num) for sequence, num in growth.items())
        if needed > len(self._free):
            raise OutOfKVBlocks(
                f"the step needs {needed} KV blocks of {self.block_size} tokens and {len(self._free)} are free: "
                "shrink the batch, free a sequence, or start with more kv_tokens"
            )
        return [copy for sequence, num in growth.items() for copy in self._grow(self._tables[sequence], num)]

    def truncate(self, sequence: SequenceId, length: int) -> None:
        """Keep the first `length` positions and drop whole blocks beyond them.

        Raises:
            ValueError: `length` is negative or beyond the present length.
        """
        table = self._table(sequence)
        if not 0 <= length <= table.length:
            raise ValueError(f"sequence {sequence} holds {table.length} tokens, cannot be truncated to {length}")
        num_kept = self._num_blocks_for(length)
        for block in table.blocks[num_kept:]:
            self._release(block)
        del table.blocks[num_kept:]
        table.length = length

    def fork(self, sequence: SequenceId) -> tuple[SequenceId, list[BlockCopy]]:
        """A sequence with the same content that shares this one's full blocks.

        Returns:
            Its id, and the copy of the last partial block if there is one.

        Raises:
            OutOfKVBlocks: no block is free for that copy; nothing has changed.
        """
        table = self._table(sequence)
        num_full = table.length // self.block_size
        copies = self._copy_tail(table, num_full)
        for block in table.blocks[:num_full]:
            self._num_holders[block] += 1
        fork = self.open()
        self._tables[fork] = _Table([*table.blocks[:num_full], *(copy.target for copy in copies)], table.length)
        return fork, copies

    def free(self, sequence: SequenceId) -> None:
        """Drop the sequence and every block that only it holds."""
        self.truncate(sequence, 0)
        del self._tables[sequence]

    def check_integrity(self) -> None:
        """Check that the books agree with themselves, in time O(blocks held).

        Raises:
            IntegrityError: says which rule is broken.
        """
        holders = Counter(block for table in self._tables.values() for block in table.blocks)
        for block, num_holders in enumerate(self._num_holders):
            _require(num_holders == holders[block], f"block {block}: {num_holders} counted, {holders[block]} hold it")
        free = [block for start, stop in self._free.runs() for block in range(start, stop)]
        _require(len(free) == len(self._free), f"{len(self._free)} blocks counted as free, {len(free)} listed")
        _require(
            sorted([*free, *holders]) == list(range(self.num_blocks)),
            "a block is both free and held, or neither, or listed twice",
        )
        self._check_tables()

    def _check_tables(self) -> None:
        place_of: dict[int, int] = {}
        for sequence, table in self._tables.items():
            _require(
                len(table.blocks) == self._num_blocks_for(table.length),
                f"sequence {sequence}: {len(table.blocks)} blocks for {table.length} tokens",
            )
            for index, block in enumerate(table.blocks):
                # A fork shares a prefix, so a block has one place; twice in one table would be two places.
                _require(place_of.setdefault(block, index) == index, f"block {block} stands at two places at once")

    def _table(self, sequence: SequenceId) -> _Table:
        try:
            return self._tables[sequence]
        except KeyError:
            raise UnknownSequence(f"sequence {sequence} is not open") from None

    def _num_blocks_for(self, length: int) -> int:
        return -(-length // self.block_size)

    def _has_shared_tail(self, table: _Table) -> bool:
        """Whether the block that the next position goes to exists and is held by others too."""
        return table.length % self.block_size != 0 and self._num_holders[table.blocks[-1]] > 1

    def _num_blocks_to_grow(self, table: _Table, num: int) -> int:
        return self._num_blocks_for(table.length + num) - len(table.blocks) + self._has_shared_tail(table)

    def _grow(self, table: _Table, num: int) -> list[BlockCopy]:
        copies = self._unshare_tail(table) if self._has_shared_tail(table) else []
        table.length += num
        missing = self._num_blocks_for(table.length) - len(table.blocks)
        table.blocks.extend(self._acquire(missing, table.blocks[-1] if table.blocks else None))
        return copies

    def _unshare_tail(self, table: _Table) -> list[BlockCopy]:
        shared = table.blocks.pop()
        [own] = self._acquire(1, table.blocks[-1] if table.blocks else None)
        table.blocks.append(own)
        self._release(shared)
        return [BlockCopy(shared, own)]

    def _copy_tail(self, table: _Table, num_full: int) -> list[BlockCopy]:
        if num_full == len(table.blocks):
            return []
        if not len(self._free):
            raise OutOfKVBlocks("no KV block is free for the fork's last block: free a sequence first")
        [own] = self._acquire(1, None)
        return [BlockCopy(table.blocks[-1], own)]

    def _acquire(self, num: int, after: int | None) -> list[int]:
        if not num:
            return []
        taken = self._free.take(num, after)
        for block in taken:
            self._num_holders[block] = 1
        return taken

    def _release(self, block: int) -> None:
        self._num_holders[block] -= 1
        if not self._num_holders[block]:
            self._free.give(block)


def _require(holds: bool, broken: str) -> None:
    if not holds:
        raise IntegrityError(broken)
