"""The pure core: what to draft, what to verify, what is committed.

No I/O, no asyncio, no tensors, no wire format. Time comes in as an argument (seconds of a monotonic clock), so the
same code runs in the workers, the coordinator, the tests and on a virtual clock.
"""
