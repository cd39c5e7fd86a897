"""What of polkit is told to all, and not to the one who asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest

from hostpassd import errors
from hostpassd.bus import access as access_module
from hostpassd.bus.access import Access
from hostpassd.bus.router import BusCallError, Call
from hostpassd.model.events import Event, ProblemChanged
from hostpassd.passthrough.permission import Check
from tests.sim.house import CALLER

ASSIGN = Call(":1.7", "/", "", "", [], interactive=False)


class Polkit:
    """Answers as the bus does in polkit's place: with what is in `answers`, one after the other."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)

    async def call(self, *_: Any, **__: Any) -> list[Any]:
        if error := self._answers.pop(0):
            raise BusCallError("org.freedesktop.DBus.Error." + error, "no")
        return [[True, False, {}]]

    async def uid_of(self, sender: str) -> int:
        return CALLER

    def vanished(self, sender: str) -> Any:
        return contextlib.nullcontext(asyncio.Event())


async def test_that_polkit_is_not_there_is_told_once_and_that_it_is_back() -> None:
    told: list[Event] = []
    polkit: Any = Polkit("ServiceUnknown", "NameHasNoOwner", "", "", "ServiceUnknown", "AccessDenied")
    access = Access(polkit, told.append, log=logging.getLogger("test"))
    heard = []
    for is_there in (False, False, True, True, False, False):
        if is_there:
            await access.check(ASSIGN, [("assign", {})])
        else:
            with pytest.raises(errors.NotAuthorized):
                await access.check(ASSIGN, [("assign", {})])
        heard.append(len(told))
    assert heard == [1, 1, 2, 2, 3, 4]
    assert told == [ProblemChanged("no-polkit", there=there) for there in (True, False, True, False)]


class Asked:
    """Polkit's answers by device, in any order: a test settles each as it likes."""

    def __init__(self) -> None:
        self.open: dict[str, asyncio.Future[list[Any]]] = {}
        self.cancelled = 0
        self.changed = asyncio.Event()

    async def call(self, *args: Any, **_: Any) -> list[Any]:
        name = args[5][2]["device.name"]
        self.open[name] = asyncio.get_running_loop().create_future()
        self.changed.set()
        try:
            return await self.open[name]
        finally:
            self.open.pop(name, None)

    def tell(self, *_: Any) -> None:
        self.cancelled += 1

    async def uid_of(self, sender: str) -> int:
        return CALLER

    def vanished(self, sender: str) -> Any:
        return contextlib.nullcontext(asyncio.Event())

    async def has_open(self, count: int) -> None:
        while len(self.open) < count:
            self.changed.clear()
            await self.changed.wait()


def rows_of(count: int) -> list[list[Check]]:
    return [[("assign", {"device.name": f"d{number}"})] for number in range(count)]


async def test_a_list_is_asked_about_some_at_once_and_answered_in_its_order() -> None:
    polkit: Any = Asked()
    access = Access(polkit, lambda event: None, log=logging.getLogger("test"))
    work = asyncio.create_task(access.would_each(ASSIGN, rows_of(12)))
    said = {0: (True, False), 1: (False, True), 2: (False, False)}
    for left in range(12, 0, -1):
        await polkit.has_open(min(left, access_module.ROWS_AT_ONCE))
        assert len(polkit.open) <= access_module.ROWS_AT_ONCE
        name = max(polkit.open, key=lambda name: int(name[1:]))
        answer = said[int(name[1:]) % 3]
        polkit.open.pop(name).set_result([[*answer, {}]])
    assert await work == ["yes", "challenge", "no"] * 4


async def test_when_polkit_does_not_answer_the_rest_of_a_list_waits_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "TIMEOUT", 0.05)
    polkit: Any = Asked()
    access = Access(polkit, lambda event: None, log=logging.getLogger("test"))
    work = asyncio.create_task(access.would_each(ASSIGN, rows_of(1000)))
    await polkit.has_open(access_module.ROWS_AT_ONCE)
    polkit.open["d1"].set_result([[True, False, {}]])
    assert await work == ["no", "yes", *["no"] * 998]
    assert not polkit.open and polkit.cancelled == access_module.ROWS_AT_ONCE


async def test_where_polkit_is_not_there_a_list_is_no_after_few_questions() -> None:
    polkit: Any = Polkit(*["ServiceUnknown"] * access_module.ROWS_AT_ONCE)
    access = Access(polkit, lambda event: None, log=logging.getLogger("test"))
    assert await access.would_each(ASSIGN, rows_of(100)) == ["no"] * 100
    assert await access.would_each(ASSIGN, []) == []
