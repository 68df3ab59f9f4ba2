"""A child process that never outlives its parent, however that ends.

On Linux the kernel kills it (``PR_SET_PDEATHSIG``). Everywhere the child also holds one end of a pipe as its standard
input; when the parent is gone the pipe ends, and so does the child.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0


def die_with_parent() -> None:
    """Call first thing in the child; its standard input must be a pipe that only the parent holds."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_end_with_stdin, name="parent-watch", daemon=True).start()


def _end_with_stdin() -> None:
    # os.read and not sys.stdin: a daemon thread inside a buffered reader breaks the interpreter's shutdown.
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)
