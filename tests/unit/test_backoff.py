"""What failed is tried again after ever longer pauses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hostpassd.backoff import Backoff
from tests.unit.clockwork import Clockwork


@pytest.fixture
def loop() -> Iterator[Clockwork]:
    made = Clockwork()
    yield made
    made.abandon()


def test_pauses_grow_to_a_limit_each_things_own(loop: Clockwork) -> None:
    backoff = Backoff(2, 15)
    assert [loop.do(lambda: backoff.failed("a")) for _ in range(5)] == [2, 4, 8, 15, 15]
    assert loop.do(lambda: backoff.failed("b")) == 2
    loop.advance(2)
    assert loop.do(lambda: [backoff.is_due(what) for what in "abc"]) == [False, True, True]
    loop.advance(13)
    assert loop.do(lambda: backoff.is_due("a"))


def test_what_is_no_longer_wanted_begins_anew(loop: Clockwork) -> None:
    backoff = Backoff(2, 15)
    loop.do(lambda: [backoff.failed(what) for what in "aabb"])
    backoff.keep({"b"})
    assert loop.do(lambda: [backoff.is_due(what) for what in "ab"]) == [True, False]
    assert loop.do(lambda: [backoff.failed(what) for what in "ab"]) == [2, 8]
