"""What of polkit is told to all, and not to the one who asked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import pytest

from hostpassd import errors
from hostpassd.bus import access as access_module
from hostpassd.bus.access import Access, Asking
from hostpassd.bus.router import BusCallError, Call
from hostpassd.model.events import Event, ProblemChanged
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


async def test_once_polkit_has_not_answered_in_time_nobody_waits_for_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_module, "TIMEOUT", 0.01)
    polkit: Any = Polkit("", "AccessDenied")
    asking = Asking(Access(polkit, lambda event: None, log=logging.getLogger("test")), ASSIGN)
    assert [await asking.would([("assign", {})]) for _ in range(2)] == ["yes", "no"]  # the second is no silence
    asked = []

    async def never(*_: Any, **__: Any) -> None:
        asked.append(1)
        await asyncio.get_running_loop().create_future()

    polkit.call = never
    polkit.tell = lambda *_: None
    assert [await asking.would([("assign", {})]) for _ in range(3)] == ["no"] * 3 and len(asked) == 1
