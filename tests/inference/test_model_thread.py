"""The model thread's promises, by events and queues alone: no test sleeps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue

import pytest
import torch

from inference import ModelThread, ModelThreadStopped, StepResult
from inference.model_thread import _Stop

WITHIN_S = 10.0
"""Longer than anything here takes: reached only by a thread that is stuck."""


class ScriptedEngine:
    """Each step runs the next function of the script; when it is used up, steps do nothing and wait for commands."""

    def __init__(self, *script: Callable[[], StepResult[str]]) -> None:
        self.script = list(script)
        self.applied: SimpleQueue[list[str]] = SimpleQueue()
        self.stepped: SimpleQueue[None] = SimpleQueue()
        self.arrived: Callable[[], Sequence[str]] = tuple

    def apply(self, commands: Sequence[str]) -> None:
        self.applied.put(list(commands))

    def step(self, arrived: Callable[[], Sequence[str]]) -> StepResult[str]:
        self.arrived = arrived
        self.stepped.put(None)
        return self.script.pop(0)() if self.script else StepResult()


class Harness:
    def __init__(self) -> None:
        self.delivered: SimpleQueue[list[str]] = SimpleQueue()
        self.failures: SimpleQueue[BaseException] = SimpleQueue()
        self.threads: list[ModelThread[str, str]] = []

    def start(self, engine: ScriptedEngine, num_threads: int | None = None) -> ModelThread[str, str]:
        thread: ModelThread[str, str] = ModelThread(
            engine,
            lambda outputs: self.delivered.put(list(outputs)),
            on_failure=self.failures.put,
            num_threads=num_threads,
        )
        self.threads.append(thread)
        thread.start()
        return thread


@pytest.fixture
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    for thread in harness.threads:
        thread.stop()


def test_commands_arrive_in_order_and_together(harness: Harness) -> None:
    is_busy, go_on = threading.Event(), threading.Event()

    def busy() -> StepResult[str]:
        is_busy.set()
        assert go_on.wait(WITHIN_S)
        return StepResult(["first"])

    engine = ScriptedEngine(busy, lambda: StepResult(["second"]))
    thread = harness.start(engine)
    thread.submit("a")
    assert is_busy.wait(WITHIN_S)
    for command in "bcd":
        thread.submit(command)
    go_on.set()
    assert engine.applied.get(timeout=WITHIN_S) == ["a"]
    assert engine.applied.get(timeout=WITHIN_S) == ["b", "c", "d"]
    assert harness.delivered.get(timeout=WITHIN_S) == ["first"]
    assert harness.delivered.get(timeout=WITHIN_S) == ["second"]


def test_a_step_can_have_what_has_come_meanwhile(harness: Harness) -> None:
    is_busy, go_on = threading.Event(), threading.Event()
    seen: list[Sequence[str]] = []

    def busy() -> StepResult[str]:
        is_busy.set()
        assert go_on.wait(WITHIN_S)
        seen.extend([engine.arrived(), engine.arrived()])
        return StepResult(["first"])

    engine = ScriptedEngine(busy, lambda: StepResult(["second"]))
    thread = harness.start(engine)
    thread.submit("a")
    assert is_busy.wait(WITHIN_S)
    thread.submit("b")
    thread.wake()
    thread.submit("c")
    go_on.set()
    assert harness.delivered.get(timeout=WITHIN_S) == ["first"]
    assert harness.delivered.get(timeout=WITHIN_S) == ["second"], "who was to be woken slept on"
    assert seen == [["b", "c"], []]
    assert engine.applied.get(timeout=WITHIN_S) == ["a"]
    assert engine.applied.empty(), "commands were applied twice"


def test_a_step_that_takes_what_has_come_does_not_swallow_the_end(harness: Harness) -> None:
    is_busy, go_on = threading.Event(), threading.Event()

    def busy() -> StepResult[str]:
        is_busy.set()
        assert go_on.wait(WITHIN_S)
        while not engine.arrived():  # until the one that was submitted after the end is here
            pass
        return StepResult(wait_s=0.0)

    engine = ScriptedEngine(busy)
    thread = harness.start(engine)
    thread.submit("a")
    assert is_busy.wait(WITHIN_S)
    thread._queue.put(_Stop())
    thread.submit("b")
    go_on.set()
    thread._thread.join(WITHIN_S)
    assert not thread._thread.is_alive()


def test_no_step_before_the_first_command(harness: Harness) -> None:
    engine = ScriptedEngine()
    thread = harness.start(engine)
    thread.submit("a")
    engine.stepped.get(timeout=WITHIN_S)
    assert engine.applied.get(timeout=WITHIN_S) == ["a"]
    with pytest.raises(Empty):
        engine.stepped.get_nowait()


@pytest.mark.parametrize("wait_s", [0.0, -0.5])
def test_steps_on_without_commands_while_there_is_work(harness: Harness, wait_s: float) -> None:
    engine = ScriptedEngine(*[lambda: StepResult(["x"], wait_s=wait_s)] * 3)
    harness.start(engine).submit("a")
    for _ in range(4):  # the fourth has nothing to do and waits
        engine.stepped.get(timeout=WITHIN_S)
    assert engine.applied.get(timeout=WITHIN_S) == ["a"]
    assert engine.applied.empty()


def test_steps_again_when_the_wait_is_over(harness: Harness) -> None:
    engine = ScriptedEngine(lambda: StepResult(wait_s=0.001), lambda: StepResult(["after the wait"]))
    harness.start(engine).submit("a")
    assert harness.delivered.get(timeout=WITHIN_S) == ["after the wait"]


def test_a_command_ends_a_long_wait(harness: Harness) -> None:
    engine = ScriptedEngine(lambda: StepResult(["waiting"], wait_s=3600))
    thread = harness.start(engine)
    thread.submit("a")
    assert harness.delivered.get(timeout=WITHIN_S) == ["waiting"]
    thread.submit("b")
    assert engine.applied.get(timeout=WITHIN_S) == ["a"]
    assert engine.applied.get(timeout=WITHIN_S) == ["b"]


def test_a_step_without_outputs_delivers_nothing(harness: Harness) -> None:
    engine = ScriptedEngine(lambda: StepResult(wait_s=0), lambda: StepResult(["something"]))
    harness.start(engine).submit("a")
    assert harness.delivered.get(timeout=WITHIN_S) == ["something"]


@pytest.mark.parametrize("wait_s", [None, 3600.0, 0.0])
def test_stop_ends_any_wait(harness: Harness, wait_s: float | None) -> None:
    engine = ScriptedEngine(*[lambda: StepResult(["x"], wait_s=wait_s)] * 1_000_000)
    thread = harness.start(engine)
    thread.submit("a")
    harness.delivered.get(timeout=WITHIN_S)
    thread.stop()
    assert not thread._thread.is_alive()
    with pytest.raises(ModelThreadStopped):
        thread.submit("b")
    thread.stop()
    assert harness.failures.empty()


def test_failure_is_reported_and_ends_the_thread(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> StepResult[str]:
        raise MemoryError("no more")

    thread = harness.start(ScriptedEngine(fail))
    with caplog.at_level(logging.ERROR):
        thread.submit("a")
        failure = harness.failures.get(timeout=WITHIN_S)
        thread.stop()  # the owner is told first, the log after
    assert isinstance(failure, MemoryError)
    assert "no more" in caplog.text
    with pytest.raises(ModelThreadStopped):
        thread.submit("b")


def test_a_failed_thread_takes_no_more_commands(harness: Harness) -> None:
    def fail() -> StepResult[str]:
        raise MemoryError

    outcome: SimpleQueue[str] = SimpleQueue()

    def submit_again(error: BaseException) -> None:
        try:
            thread.submit("b")
        except ModelThreadStopped:
            outcome.put("refused")
        else:
            outcome.put("taken")

    thread: ModelThread[str, str] = ModelThread(ScriptedEngine(fail), harness.delivered.put, on_failure=submit_again)
    thread.start()
    thread.submit("a")
    assert outcome.get(timeout=WITHIN_S) == "refused"
    thread.stop()


def test_failure_to_deliver_is_reported_too(harness: Harness) -> None:
    engine = ScriptedEngine(lambda: StepResult(["x"]))

    def refuse(outputs: Sequence[str]) -> None:
        raise ConnectionError

    thread: ModelThread[str, str] = ModelThread(engine, refuse, on_failure=harness.failures.put)
    thread.start()
    thread.submit("a")
    assert isinstance(harness.failures.get(timeout=WITHIN_S), ConnectionError)
    thread.stop()


def test_torch_threads_are_set_where_the_model_runs(harness: Harness) -> None:
    seen: SimpleQueue[int] = SimpleQueue()

    def look() -> StepResult[str]:
        seen.put(torch.get_num_threads())
        return StepResult()

    before = torch.get_num_threads()
    try:
        harness.start(ScriptedEngine(look), num_threads=2).submit("a")
        assert seen.get(timeout=WITHIN_S) == 2 != before
    finally:
        torch.set_num_threads(before)
