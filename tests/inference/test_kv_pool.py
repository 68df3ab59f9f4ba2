"""The KV pool's books against the simplest model of them: every sequence is a Python list."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from inference import IntegrityError, OutOfKVBlocks, SequenceId, UnknownSequence
from inference.free_blocks import FreeBlocks
from inference.kv_pool import BlockCopy, KVPool


class KVPoolMachine(RuleBasedStateMachine):
    """Writes a fresh value to every new position of a fake memory, and reads all sequences back after each rule."""

    sequences = Bundle("sequences")

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool = KVPool(num_blocks, block_size)
        self.memory: list[int | None] = [None] * (num_blocks * block_size)
        self.lists: dict[SequenceId, list[int]] = {}
        self.next_value = 0

    @rule(target=sequences)
    def open(self) -> SequenceId:
        sequence = self.pool.open()
        assert sequence not in self.lists
        self.lists[sequence] = []
        return sequence

    @rule(growth=st.dictionaries(sequences, st.integers(1, 9), max_size=3))
    def extend(self, growth: dict[SequenceId, int]) -> None:
        before = self._books()
        try:
            copies = self.pool.extend(growth)
        except OutOfKVBlocks:
            assert self._books() == before
            assert self._most_blocks_needed(growth) > self.pool.num_free_blocks
            return
        self._carry_out(copies)
        for sequence, num in growth.items():
            for position in range(len(self.lists[sequence]), len(self.lists[sequence]) + num):
                self.memory[self._slot(sequence, position)] = self.next_value
                self.lists[sequence].append(self.next_value)
                self.next_value += 1

    @rule(sequence=sequences, share=st.floats(0, 1))
    def truncate(self, sequence: SequenceId, share: float) -> None:
        length = round(share * len(self.lists[sequence]))
        self.pool.truncate(sequence, length)
        del self.lists[sequence][length:]

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: SequenceId) -> SequenceId | MultipleResults[SequenceId]:
        before = self._books()
        try:
            fork, copies = self.pool.fork(sequence)
        except OutOfKVBlocks:
            assert self._books() == before
            assert self.pool.num_free_blocks == 0
            assert len(self.lists[sequence]) % self.pool.block_size
            return multiple()
        self._carry_out(copies)
        self.lists[fork] = list(self.lists[sequence])
        return fork

    @rule(sequence=consumes(sequences))
    def free(self, sequence: SequenceId) -> None:
        self.pool.free(sequence)
        del self.lists[sequence]
        with pytest.raises(UnknownSequence):
            self.pool.length(sequence)

    @invariant()
    def every_sequence_reads_back(self) -> None:
        for sequence, values in self.lists.items():
            assert self.pool.length(sequence) == len(values)
            assert [self.memory[self._slot(sequence, p)] for p in range(len(values))] == values

    @invariant()
    def books_agree(self) -> None:
        self.pool.check_integrity()
        held = {block for sequence in self.lists for block in self.pool.blocks(sequence)}
        assert self.pool.num_free_blocks == self.pool.num_blocks - len(held)

    def _slot(self, sequence: SequenceId, position: int) -> int:
        block, offset = divmod(position, self.pool.block_size)
        return self.pool.blocks(sequence)[block] * self.pool.block_size + offset

    def _carry_out(self, copies: list[BlockCopy]) -> None:
        size = self.pool.block_size
        for copy in copies:
            content = self.memory[copy.source * size : (copy.source + 1) * size]
            self.memory[copy.target * size : (copy.target + 1) * size] = content

    def _books(self) -> list[tuple[int, list[int]]]:
        return [(self.pool.length(sequence), list(self.pool.blocks(sequence))) for sequence in self.lists]

    def _most_blocks_needed(self, growth: dict[SequenceId, int]) -> int:
        """Whole new blocks, and one copy for each sequence that might share its last block."""
        size = self.pool.block_size
        lengths = {sequence: len(self.lists[sequence]) for sequence in growth}
        return sum(-(-(lengths[s] + num) // size) - -(-lengths[s] // size) + 1 for s, num in growth.items())


TestKVPool = KVPoolMachine.TestCase
TestKVPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_a_growing_sequence_stays_in_one_run() -> None:
    pool = KVPool(num_blocks=64, block_size=4)
    sequences = [pool.open() for _ in range(4)]
    for _ in range(12):
        pool.extend(dict.fromkeys(sequences, 4))
    for sequence in sequences:
        blocks = pool.blocks(sequence)
        assert blocks == list(range(blocks[0], blocks[0] + 12))


def test_the_last_free_block_can_be_used() -> None:
    pool = KVPool(num_blocks=3, block_size=2)
    first, second = pool.open(), pool.open()
    pool.extend({first: 2, second: 2})
    pool.extend({first: 2})
    with pytest.raises(OutOfKVBlocks, match="needs 1 KV blocks of 2 tokens and 0 are free"):
        pool.extend({second: 1})


def test_growing_into_a_shared_block_needs_room_for_its_copy() -> None:
    pool = KVPool(num_blocks=2, block_size=2)
    trunk = pool.open()
    pool.extend({trunk: 4})
    branch, _ = pool.fork(trunk)
    pool.truncate(branch, 1)
    with pytest.raises(OutOfKVBlocks):
        pool.extend({branch: 1})
    pool.truncate(trunk, 2)
    [copy] = pool.extend({branch: 1})
    assert copy.source == pool.blocks(trunk)[0] != pool.blocks(branch)[0] == copy.target


def test_a_fork_leaves_the_trunk_in_place() -> None:
    """The trunk is the sequence that goes on: the copy of the partial block is the fork's."""
    pool = KVPool(num_blocks=32, block_size=4)
    trunk = pool.open()
    pool.extend({trunk: 6})
    fork, [copy] = pool.fork(trunk)
    assert pool.blocks(fork) == [pool.blocks(trunk)[0], copy.target]
    assert pool.extend({trunk: 6}) == []
    assert pool.blocks(trunk) == [0, 1, 2]


@pytest.mark.parametrize("length", [-1, 6])
def test_truncate_only_shortens(length: int) -> None:
    pool = KVPool(num_blocks=3, block_size=2)
    sequence = pool.open()
    pool.extend({sequence: 5})
    with pytest.raises(ValueError, match="cannot be truncated"):
        pool.truncate(sequence, length)


def _two_forks() -> tuple[KVPool, SequenceId, SequenceId]:
    pool = KVPool(num_blocks=8, block_size=2)
    trunk = pool.open()
    pool.extend({trunk: 4})
    return pool, trunk, pool.fork(trunk)[0]


def test_integrity_notices_a_lost_reference() -> None:
    pool, trunk, _ = _two_forks()
    pool._num_holders[pool.blocks(trunk)[0]] -= 1
    with pytest.raises(IntegrityError, match="1 counted, 2 hold it"):
        pool.check_integrity()


def test_integrity_notices_a_block_both_free_and_held() -> None:
    pool, trunk, _ = _two_forks()
    pool._free.give(pool.blocks(trunk)[0])
    with pytest.raises(IntegrityError, match="both free and held"):
        pool.check_integrity()


def test_integrity_notices_a_lost_block() -> None:
    pool, _, _ = _two_forks()
    pool._free.take(1, None)
    with pytest.raises(IntegrityError, match="or neither"):
        pool.check_integrity()


def test_integrity_notices_a_wrong_length() -> None:
    pool, trunk, _ = _two_forks()
    pool._tables[trunk].length += 1
    with pytest.raises(IntegrityError, match="2 blocks for 5 tokens"):
        pool.check_integrity()


def test_integrity_notices_a_block_in_two_places() -> None:
    pool, trunk, _ = _two_forks()
    pool.blocks(trunk).reverse()
    with pytest.raises(IntegrityError, match="two places"):
        pool.check_integrity()


class FreeBlocksMachine(RuleBasedStateMachine):
    """Free runs against a plain set."""

    def __init__(self) -> None:
        super().__init__()
        self.free_blocks = FreeBlocks(20)
        self.free = set(range(20))

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        num = data.draw(st.integers(0, len(self.free)))
        after = data.draw(st.none() | st.integers(0, 19))
        taken = self.free_blocks.take(num, after)
        assert len(taken) == len(set(taken)) == num
        assert self.free.issuperset(taken)
        if num and after is not None and after + 1 in self.free:
            assert taken[0] == after + 1
        self.free.difference_update(taken)

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        held = sorted(set(range(20)) - self.free)
        if held:
            block = data.draw(st.sampled_from(held))
            self.free_blocks.give(block)
            self.free.add(block)

    @invariant()
    def runs_are_the_set(self) -> None:
        runs = self.free_blocks.runs()
        assert [block for start, stop in runs for block in range(start, stop)] == sorted(self.free)
        assert all(left[1] < right[0] for left, right in itertools.pairwise(runs)), "neighbours not joined"
        assert len(self.free_blocks) == len(self.free)


TestFreeBlocks = FreeBlocksMachine.TestCase
TestFreeBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
