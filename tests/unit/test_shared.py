"""Shared work: everybody gets a run that begins after the call, and nobody more of them than needed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from hostpassd.base.shared import Shared
from hostpassd.errors import TimedOut
from tests.sim.clockwork import Clockwork


@pytest.fixture
def loop() -> Iterator[Clockwork]:
    made = Clockwork()
    yield made
    made.abandon()


class Work:
    """Work of a second, which comes to its number."""

    def __init__(self, loop: Clockwork, pause: float = 0.0) -> None:
        self.loop = loop
        self.began: list[float] = []
        self.error: Exception | None = None
        self.shared = loop.do(lambda: Shared(self.do, pause))

    async def do(self) -> int:
        self.began.append(self.loop.now)
        await asyncio.sleep(1)
        if self.error:
            raise self.error
        return len(self.began)

    def ask(self) -> asyncio.Task[Any]:
        return self.loop.do(lambda: self.loop.create_task(self.shared()))


def test_who_asks_during_a_run_gets_the_next(loop: Clockwork) -> None:
    work = Work(loop)
    first, (*others,) = work.ask(), [work.ask() for _ in range(32)]
    loop.advance(3)
    assert first.result() == 1 and {task.result() for task in others} == {2}
    assert work.began == [1000, 1001]


def test_runs_keep_apart(loop: Clockwork) -> None:
    work = Work(loop, pause=5)
    first = work.ask()
    loop.advance(1)
    assert first.done()
    early, later = work.ask(), None
    loop.advance(4)
    later = work.ask()  # what has not begun serves it, too
    loop.advance(2)
    assert early.result() == later.result() == 2 and work.began == [1000, 1006]
    loop.advance(100)
    work.ask()
    assert work.began[2] == 1107


def test_who_leaves_does_not_end_the_run_of_others(loop: Clockwork) -> None:
    work = Work(loop)
    work.ask()
    leaves, stays = work.ask(), work.ask()
    loop.do(leaves.cancel)
    loop.advance(2)
    assert stays.result() == 2


def test_a_failure_is_everybodys_and_not_the_last_word(loop: Clockwork) -> None:
    work = Work(loop)
    work.error = TimedOut("too slow")
    tasks = [work.ask(), work.ask()]
    loop.advance(2)
    assert all(isinstance(task.exception(), TimedOut) for task in tasks) and loop.faults == []
    work.error = None
    again = work.ask()
    loop.advance(1)
    assert again.result() == 3


def test_a_fault_of_our_own_is_for_the_loops_handler_also_when_nobody_waits_any_more(loop: Clockwork) -> None:
    work = Work(loop)
    work.error = RuntimeError("a fault of ours")
    task = work.ask()
    loop.do(task.cancel)
    loop.advance(2)
    assert any("a fault of ours" in fault for fault in loop.faults)
