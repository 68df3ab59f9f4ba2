"""Which blocks of the KV pool are free, kept as runs so that a sequence can grow in place.

A sequence whose blocks follow one another is read by attention as a plain view of the pool; a scattered one must
be gathered, in every layer of every step. So neighbours matter: a sequence takes the block after its last one
whenever it can, and a new sequence starts in the middle of the largest free run, which leaves both it and the
sequence before that run room to grow. All operations cost O(log runs), but for finding the largest run: O(runs).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class FreeBlocks:
    """Disjoint, non-adjacent free runs [start, stop), in ascending order."""

    def __init__(self, num_blocks: int) -> None:
        self._starts: list[int] = [0] if num_blocks else []
        self._stops: list[int] = [num_blocks] if num_blocks else []
        self._num_blocks = num_blocks
        self._num_free = num_blocks

    def __len__(self) -> int:
        return self._num_free

    def runs(self) -> list[tuple[int, int]]:
        """The free runs [start, stop), ascending."""
        return list(zip(self._starts, self._stops, strict=True))

    def take(self, num: int, after: int | None) -> list[int]:
        """Take `num` free blocks, in as few runs as can be had cheaply.

        `after` is the block that the first of them should follow, None for a new sequence. The caller has checked
        that enough are free.
        """
        taken: list[int] = []
        while len(taken) < num:
            wanted = num - len(taken)
            start, room = self._next_run(wanted, after)
            taken.extend(self._carve(start, min(room, wanted)))
            after = taken[-1]
        return taken

    def give(self, block: int) -> None:
        """Return one block, joining it to its free neighbours."""
        index = bisect_left(self._starts, block)
        joins_left = index > 0 and self._stops[index - 1] == block
        joins_right = index < len(self._starts) and self._starts[index] == block + 1
        if joins_left and joins_right:
            self._stops[index - 1] = self._stops.pop(index)
            del self._starts[index]
        elif joins_left:
            self._stops[index - 1] = block + 1
        elif joins_right:
            self._starts[index] = block
        else:
            self._starts.insert(index, block)
            self._stops.insert(index, block + 1)
        self._num_free += 1

    def _next_run(self, wanted: int, after: int | None) -> tuple[int, int]:
        """Where to go on taking: (start, free blocks from there)."""
        if after is not None:
            index = bisect_right(self._starts, after + 1) - 1
            if index >= 0 and after + 1 < self._stops[index]:
                return after + 1, self._stops[index] - after - 1
        start, stop = max(self.runs(), key=lambda run: run[1] - run[0])
        # The pool's first run has no sequence before it that might want to grow.
        middle = start if start == 0 else (start + stop) // 2
        if stop - middle < wanted:
            middle = max(start, stop - wanted)
        return middle, stop - middle

    def _carve(self, start: int, num: int) -> range:
        """Remove [start, start + num), which lies inside one run."""
        stop = start + num
        index = bisect_right(self._starts, start) - 1
        run_start, run_stop = self._starts[index], self._stops[index]
        left = [(run_start, start)] if run_start < start else []
        right = [(stop, run_stop)] if stop < run_stop else []
        self._starts[index : index + 1] = [run[0] for run in left + right]
        self._stops[index : index + 1] = [run[1] for run in left + right]
        self._num_free -= num
        return range(start, stop)
