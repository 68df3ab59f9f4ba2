"""Everything that this package raises on purpose, as one small tree.

Each message is one line: what is wrong, then what to do.
"""


class InferenceError(Exception):
    """Root of this package's errors."""


class ModelLoadError(InferenceError):
    """The model exists but cannot be run here: unsupported architecture, broken weights, too little memory."""


class ModelNotFound(ModelLoadError):
    """The name is neither a folder with a model in it nor a model that the Hugging Face hub can give us."""


class OutOfKVBlocks(InferenceError):
    """The KV pool has too few free blocks. Raised before any state changes: shrink the batch or free a sequence."""


class ContextOverflow(InferenceError):
    """A sequence would grow beyond `max_context`. Raised before any state changes."""


class UnknownSequence(InferenceError, KeyError):
    """The sequence was never opened, or has been freed."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class IntegrityError(InferenceError):
    """The KV pool's books contradict themselves: a bug in this package, found by `check_integrity()`."""
