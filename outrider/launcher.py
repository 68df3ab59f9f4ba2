"""A whole deployment on this machine: draft worker, target worker and coordinator as three processes.

The children are ours alone: they are stopped with the stack, they die with this process however it ends
(`outrider.parent_watch`), and they are never found by name.
"""

from __future__ import annotations

import asyncio
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from outrider.failures import BadUsage, CommandFailed
from outrider.role_process import RoleProcess, StatusListener
from outrider.settings import StackSettings
from rpc.server import check_bindable

TARGET: Final = "target-worker"
DRAFT: Final = "draft-worker"
COORDINATOR: Final = "coordinator"

_DEMO_PAIR: Final = Path(__file__).resolve().parent.parent / "models"
_RESTART_MIN_S: Final = 0.5
_RESTART_MAX_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class StackOptions:
    """What a stack is made of; None and "auto" leave the choice to the roles, or to ``config``."""

    target: str
    draft: str | None
    """None: no draft worker, plain decoding."""
    host: str = "127.0.0.1"
    grpc_port: int = 0
    """0: any free port."""
    http_port: int | None = None
    """0: any free port; None: no HTTP."""
    policy: str | None = None
    max_k: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    target_threads: int = 0
    """0: a share of the cores, see `share_of_cores`."""
    draft_threads: int = 0
    draft_latency_ms: float = 0.0
    """For experiments: the drafter is so far away, each way."""
    config: Path | None = None
    """TOML file that the roles read too."""


class LocalStack:
    """``async with LocalStack(options) as stack: ... stack.address``.

    Entering raises `CommandFailed` (or `rpc.errors.AddressInUse`) with the message of the role that could not start;
    leaving, by whatever way, returns when all three processes are gone.
    """

    def __init__(self, options: StackOptions, listener: StatusListener | None = None) -> None:
        self._options = options
        self._listener: StatusListener = listener or (lambda role, text: None)
        self._roles: dict[str, RoleProcess] = {}
        self._supervisor: asyncio.Task[CommandFailed] | None = None
        self.address = ""
        """Where clients reach the coordinator, once the stack is up."""
        self.http_address = ""
        """Where its HTTP API is; empty if it has none."""

    async def __aenter__(self) -> LocalStack:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def pids(self) -> dict[str, int]:
        """Process id by role, of what runs now."""
        return {role: process.pid for role, process in self._roles.items() if process.returncode is None}

    async def failed(self) -> CommandFailed:
        """Waits until the stack can serve no more, and says why. A lost draft worker is replaced, not a failure."""
        assert self._supervisor is not None, "the stack is not up"
        return await asyncio.shield(self._supervisor)

    async def _start(self) -> None:
        for port in (self._options.grpc_port, self._options.http_port):
            if port:
                check_bindable(self._options.host, port)  # before loading models rather than after
        workers = [(TARGET, worker_arguments(self._options, TARGET))]
        if self._options.draft is not None:
            workers.append((DRAFT, worker_arguments(self._options, DRAFT)))
        for role, arguments in workers:
            await self._launch(role, arguments)
        addresses = await self._all_ready([role for role, _ in workers])
        await self._launch(COORDINATOR, coordinator_arguments(self._options, addresses))
        self.address = (await self._all_ready([COORDINATOR]))[COORDINATOR]
        self.http_address = self._roles[COORDINATOR].http_address
        self._supervisor = asyncio.create_task(self._supervise(addresses))

    async def _launch(self, role: str, arguments: Sequence[str]) -> RoleProcess:
        process = await RoleProcess.start(role, arguments, self._listener, self._cores_of(role))
        self._roles[role] = process
        return process

    def _cores_of(self, role: str) -> set[int] | None:
        """None: any, as where somebody has chosen numbers of threads and with them what runs where."""
        options = self._options
        is_chosen = options.target_threads or options.draft_threads
        is_chosen = is_chosen or any(_is_configured(table, "threads", options.config) for table in ("target", "draft"))
        if is_chosen or not hasattr(os, "sched_getaffinity"):
            return None
        return cores_of(role, sorted(os.sched_getaffinity(0)), options.draft is not None)

    async def _all_ready(self, roles: Sequence[str]) -> dict[str, str]:
        """Addresses of ``roles``; raises as soon as any role that runs by now ends instead."""
        ready = {role: asyncio.create_task(self._roles[role].ready()) for role in roles}
        ends = [asyncio.create_task(process.ended()) for process in self._roles.values()]
        everything: asyncio.Future[list[str]] = asyncio.gather(*ready.values())
        waited: list[asyncio.Future[Any]] = [everything, *ends]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            failure = next((end.result() for end in ends if end.done()), None)
            if failure is not None and not everything.done():
                raise failure
            return dict(zip(ready, await everything, strict=True))
        finally:
            await _cancel([everything, *ready.values(), *ends])

    async def _supervise(self, addresses: dict[str, str]) -> CommandFailed:
        """Keeps a draft worker alive; returns when the target worker or the coordinator ends."""
        ends = [asyncio.create_task(self._roles[role].ended()) for role in (TARGET, COORDINATOR)]
        tasks: list[asyncio.Task[CommandFailed]] = [*ends]
        if DRAFT in addresses:
            tasks.append(asyncio.create_task(self._keep_drafting(addresses[DRAFT])))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            await _cancel(tasks)

    async def _keep_drafting(self, address: str) -> CommandFailed:
        """Replaces a draft worker that ended by one on the same port; meanwhile sessions go on as plain decoding."""
        delay_s = _RESTART_MIN_S
        while True:
            failure = await self._roles[DRAFT].ended()
            self._listener(DRAFT, f"lost ({failure.message}); plain decoding until it is back")
            await asyncio.sleep(delay_s)
            port = int(address.rpartition(":")[2])
            process = await self._launch(DRAFT, worker_arguments(self._options, DRAFT, port))
            try:
                await process.ready()
                delay_s = _RESTART_MIN_S
            except CommandFailed:
                delay_s = min(2 * delay_s, _RESTART_MAX_S)

    async def _stop(self) -> None:
        """Stops the coordinator and the workers; a cancellation on the way kills what is left, and is passed on."""
        if self._supervisor is not None:
            await _cancel([self._supervisor])
        try:
            for role in (COORDINATOR, DRAFT, TARGET):  # those who call before those who answer
                if role in self._roles:
                    await self._roles[role].stop()
        finally:
            for process in self._roles.values():
                process.kill()


def demo_pair() -> tuple[str, str]:
    """Paths of the target and draft model that come with the source tree. Raises `BadUsage` without them."""
    target, draft = _DEMO_PAIR / "target", _DEMO_PAIR / "draft"
    if not (target / "config.json").is_file() or not (draft / "config.json").is_file():
        raise BadUsage("the demo models come with the source tree, not with this install: give --target and --draft")
    return str(target), str(draft)


def chosen_pair(target: str, draft: str, drafting: bool = True) -> tuple[str, str | None]:
    """The models asked for, or the demo pair if neither is. Raises `BadUsage`."""
    if not target and not draft:
        demo_target, demo_draft = demo_pair()
        return demo_target, demo_draft if drafting else None
    if not target:
        raise BadUsage("--draft without --target: a drafter serves one target, name it with --target")
    if not drafting:
        return target, None
    if not draft:
        advice = "name a small model of the same vocabulary (outrider up can do without: --no-draft)"
        raise BadUsage(f"--target without --draft: {advice}")
    return target, draft


def stack_options(settings: StackSettings, config: Path | None, drafting: bool = True) -> StackOptions:
    """What a command's settings ask for. Raises `BadUsage` for half a pair."""
    target, draft = chosen_pair(settings.target, settings.draft, drafting)
    return StackOptions(
        target=target,
        draft=draft,
        policy=settings.policy,
        max_k=settings.max_k,
        device=settings.device,
        dtype=settings.dtype,
        target_threads=settings.target_threads,
        draft_threads=settings.draft_threads,
        config=config,
    )


def cores_of(role: str, cores: Sequence[int], drafting: bool) -> set[int] | None:
    """The cores that a role is kept on; None: any.

    The target has its share for itself. Otherwise the system moves its model thread about while drafter, coordinator
    and client come and go: on two cores that costs a fifth of the speed.
    """
    num_target = share_of_cores(len(cores), drafting)[0]
    if not drafting or len(cores) <= num_target:
        return None
    return set(cores[:num_target] if role == TARGET else cores[num_target:])


def share_of_cores(num_cores: int, drafting: bool) -> tuple[int, int]:
    """CPU threads of the target and of the draft worker: both run all the time, so they must not fight over cores."""
    if not drafting:
        return max(1, num_cores - 1), 0
    return max(1, num_cores // 2), max(1, num_cores // 4)


def worker_arguments(options: StackOptions, role: str, port: int = 0) -> list[str]:
    """Command line of a worker on the loopback interface."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = share_of_cores(cores, options.draft is not None)
    drafting = role == DRAFT
    model = options.draft if drafting else options.target
    threads = options.draft_threads if drafting else options.target_threads
    flags: dict[str, object] = {"model": model, "host": "127.0.0.1", "port": port}
    if threads or not _is_configured("draft" if drafting else "target", "threads", options.config):
        flags["threads"] = threads or shares[drafting]
    flags |= {name: value for name, value in (("device", options.device), ("dtype", options.dtype)) if value != "auto"}
    return _flags(flags, options.config)


def _is_configured(table: str, key: str, config: Path | None) -> bool:
    """Whether a role's own variable or TOML key says it; a flag of ours would beat both."""
    if f"OUTRIDER_{table}_{key}".upper() in os.environ:
        return True
    return config is not None and key in tomllib.loads(config.read_text()).get(table, {})


def coordinator_arguments(options: StackOptions, addresses: dict[str, str]) -> list[str]:
    """Command line of the coordinator of these workers."""
    flags: dict[str, object] = {"host": options.host, "port": options.grpc_port, "target": addresses[TARGET]}
    if DRAFT in addresses:
        flags["draft"] = addresses[DRAFT]
    if options.http_port is not None:
        flags["http_port"] = options.http_port
    if options.policy is not None:
        flags["policy"] = options.policy
    if options.max_k is not None:
        flags["max_k"] = options.max_k
    if options.draft_latency_ms:
        flags["draft_latency_ms"] = options.draft_latency_ms
    return _flags(flags, options.config)


def _flags(values: dict[str, object], config: Path | None) -> list[str]:
    named = {**values, "config": config.resolve()} if config is not None else values
    return [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]


async def _cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
