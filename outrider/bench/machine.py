"""What it was measured on: processor, versions, and the memory of running processes."""

from __future__ import annotations

import os
import platform
import re
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
    """Processor time of a process so far, all of its threads; None where there is no /proc."""
    try:
        return cpu_seconds(Path(f"/proc/{pid}/stat").read_text(), os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError):
        return None


def cpu_seconds(stat: str, ticks_per_s: int) -> float:
    """User and system time of the text of ``/proc/PID/stat``."""
    fields = stat.rpartition(")")[2].split()  # behind the name, which may hold anything
    return (int(fields[11]) + int(fields[12])) / ticks_per_s


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
