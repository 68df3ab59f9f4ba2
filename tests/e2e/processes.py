"""The command line as real processes."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import psutil

from outrider.cli import run

SOURCE_ROOT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 100.0

_ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("OUTRIDER_")},
    "PYTHONPATH": str(SOURCE_ROOT),
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
}
_COMMAND = (sys.executable, "-P", "-m", "outrider")


@dataclass(frozen=True, slots=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str


def outrider(*arguments: str, stdin: str | bytes | None = None, environment: dict[str, str] | None = None) -> Outcome:
    """Runs one command to its end."""
    return _run([*_COMMAND, *arguments], stdin, environment)


def outrider_here(*arguments: str) -> Outcome:
    """The same in this process, where what loads models is imported already."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        exit_code = run(arguments)
    return Outcome(exit_code, stdout.getvalue(), stderr.getvalue())


def python(code: str, *arguments: str) -> Outcome:
    """Runs some Python to its end."""
    return _run([sys.executable, "-P", "-c", code, *arguments])


def _run(
    command: Sequence[str], stdin: str | bytes | None = None, environment: dict[str, str] | None = None
) -> Outcome:
    done = subprocess.run(
        command,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env={**_ENVIRONMENT, **(environment or {})},
        timeout=START_TIMEOUT_S,
        check=False,
    )
    return Outcome(done.returncode, done.stdout.decode(), done.stderr.decode())


def outrider_on_terminal(*arguments: str) -> str:
    """Runs one command on a terminal of its own; returns what it wrote there. It has to succeed."""
    leader, follower = pty.openpty()
    environment = {**_ENVIRONMENT, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(
        [*_COMMAND, *arguments], stdin=follower, stdout=follower, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        shown = b"".join(_parts(leader))
        os.close(leader)
    assert process.returncode == 0, shown
    return shown.decode(errors="replace").replace("\r\n", "\n")


def _parts(leader: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # what Linux raises when the last holder of the other end has gone
        while part := os.read(leader, 4096):
            yield part


class Up:
    """A running ``outrider up``."""

    def __init__(self, process: subprocess.Popen[str], address: str, http_url: str) -> None:
        self.process = process
        self.address = address
        self.http_url = http_url
        """``http://host:port/v1``; "none" without HTTP."""

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, role: str) -> psutil.Process:
        """The child that runs ``role`` now."""
        [found] = [child for child in self.children if role in _command_line(child)]
        return found

    def end(self, number: signal.Signals) -> tuple[int, list[psutil.Process]]:
        """Sends the signal; returns the exit code and the children that outlived it by 15 s."""
        children = self.children
        assert children
        self.process.send_signal(number)
        exit_code = self.process.wait(timeout=20)
        _, alive = psutil.wait_procs(children, timeout=15)
        return exit_code, alive


def start_up(*arguments: str) -> subprocess.Popen[str]:
    """``outrider up`` on any free port, not yet ready."""
    command = [*_COMMAND, "up", "--grpc-port=0", "--http-port=0", *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_ENVIRONMENT,
    )


@contextlib.contextmanager
def running_up(*arguments: str) -> Iterator[Up]:
    """``outrider up``, ready. Whatever is left of it afterwards is killed."""
    process = start_up(*arguments)
    try:
        assert process.stdout is not None
        found = dict(line.split()[:2] for line in takewhile(lambda line: "Ctrl-C" not in line, process.stdout))
        if "gRPC" not in found:
            assert process.stderr is not None
            raise AssertionError(f"outrider up failed: {process.stderr.read()}")
        yield Up(process, found["gRPC"], found["HTTP"])
    finally:
        dispose(process)


def dispose(process: subprocess.Popen[str]) -> None:
    """Kills what the test left running and closes its pipes."""
    if process.poll() is None:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def one_line_of(text: str) -> str:
    """The text without its newline, if it is one line as people expect of an error."""
    lines: Sequence[str] = text.splitlines()
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


def _command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return process.cmdline()
    return []
