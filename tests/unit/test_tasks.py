"""Tasks that nobody waits for, and races."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hostpassd.base.tasks import Tasks, first


async def test_a_task_is_forgotten_as_it_ends_and_its_fault_goes_to_the_loop() -> None:
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    tasks = Tasks()

    async def work(fault: bool) -> None:
        if fault:
            raise RuntimeError("a fault")

    fine, broken = tasks.start(work(fault=False)), tasks.start(work(fault=True))
    assert len(tasks) == 2 and set(tasks) == {fine, broken}
    await asyncio.wait({fine, broken})
    await asyncio.sleep(0)
    assert len(tasks) == 0
    assert [str(context["exception"]) for context in told] == ["a fault"] and "handle" in told[0]


async def test_a_stop_ends_all_and_waits_for_their_ends() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("x")

    tasks = Tasks()
    for _ in range(3):
        tasks.start(work())
    await asyncio.sleep(0)
    await tasks.stop()
    assert len(ended) == 3 and len(tasks) == 0


@pytest.mark.parametrize("what", ["a future", "the event", "time"])
async def test_the_first_of_several_ends_the_wait_and_nothing_else(what: str) -> None:
    one, two, over = asyncio.Future[None](), asyncio.Future[None](), asyncio.Event()
    loop = asyncio.get_running_loop()
    if what == "a future":
        loop.call_soon(two.set_result, None)
    if what == "the event":
        loop.call_soon(over.set)
    await first(one, two, over=over, timeout=0.01 if what == "time" else 20)
    assert not one.done() and two.done() == (what == "a future")
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
