"""What it was measured on: processor, versions, and the memory of running processes."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from outrider.launcher import COORDINATOR, TARGET


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes by role. Pages that processes share (libraries) are counted for each."""

    resident_bytes: Mapping[str, int]

    @property
    def ratio(self) -> float:
        """All processes over target and coordinator alone."""
        alone = self.resident_bytes[TARGET] + self.resident_bytes[COORDINATOR]
        return sum(self.resident_bytes.values()) / alone


def memory_of(pids: Mapping[str, int]) -> Memory | None:
    """Resident memory of these processes now; None where there is no /proc."""
    try:
        return Memory({role: resident_bytes(Path(f"/proc/{pid}/status").read_text()) for role, pid in pids.items()})
    except OSError:
        return None


def cpu_seconds_of(pid: int) -> float | None:
    """Processor time of a process so far, all of its threads, to the nanosecond; None where the system has no clock for
    it. (``/proc/PID/stat`` counts in hundredths of a second, which are 5 us for each of 2,048 tokens.)"""
    libc = ctypes.CDLL(None)
    clock_id = ctypes.c_int()
    if not hasattr(libc, "clock_getcpuclockid") or libc.clock_getcpuclockid(pid, ctypes.byref(clock_id)):
        return None
    try:
        return time.clock_gettime(clock_id.value)
    except OSError:
        return None


def resident_bytes(status: str) -> int:
    """VmRSS of the text of ``/proc/PID/status``."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, object]:
    """Processor, system, versions, and how busy it was just now."""
    return {
        "cpu": cpu_name(),
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "outrider": _version("outrider"),
    }


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
