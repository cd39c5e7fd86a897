"""Long work in pieces: one in each turn of the loop, whoever has more to be done."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from hostpassd.base import pieces
from hostpassd.base.pieces import Pieces


async def test_what_is_long_has_a_piece_in_each_turn_and_nobody_waits_for_the_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "SHARE", 0)
    done: list[str] = []

    def steps(who: str, count: int) -> Iterator[int]:
        for number in range(count):
            done.append(f"{who}{number}")
            yield number

    made = Pieces()
    works = [asyncio.create_task(made.all_of(steps(who, count))) for who, count in (("a", 4), ("b", 4), ("c", 1))]
    seen = 0
    while not all(work.done() for work in works):
        await asyncio.sleep(0)
        assert len(done) - seen <= 1
        seen = len(done)
    assert [work.result() for work in works] == [[0, 1, 2, 3], [0, 1, 2, 3], [0]]
    assert done == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3", "b3"]


async def test_a_step_that_fails_or_is_given_up_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "SHARE", 0)
    made = Pieces()
    given_up = asyncio.create_task(made.all_of(range(9)))
    failing = asyncio.create_task(made.all_of(1 // (2 - number) for number in range(9)))
    other = asyncio.create_task(made.all_of(range(9)))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(ZeroDivisionError):
        await failing
    assert await other == list(range(9)) and given_up.cancelled()
