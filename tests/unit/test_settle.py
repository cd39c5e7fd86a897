"""The order of the kernel's and udevd's messages, and what never comes."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path
from typing import cast

import pytest

from hostpassd.host import settle
from hostpassd.host.settle import Outstanding, Settling


async def test_outstanding_in_either_order() -> None:
    outstanding = Outstanding()
    for number in (1, 2, 3):
        outstanding.sent(number)
    outstanding.passed(4)  # read before its kernel twin
    outstanding.sent(4)
    assert len(outstanding) == 3
    with outstanding.awaited() as awaited:
        outstanding.sent(5)  # after the call: not waited for
        for number in (3, 1, 2):
            assert not awaited.all_passed.is_set()
            outstanding.passed(number)
        await awaited.wait(1)
        assert not awaited.numbers
    assert len(outstanding) == 1


async def test_outstanding_forgets_what_was_lost_and_what_is_older_than_itself() -> None:
    outstanding = Outstanding()
    outstanding.passed(7)  # its kernel twin was sent before the socket was open
    outstanding.sent(8)
    outstanding.caught_up()
    outstanding.sent(9)
    with outstanding.awaited() as awaited:
        outstanding.forget(8)
        assert awaited.numbers == {9}
    outstanding.passed(9)
    assert len(outstanding) == 0


class Kernel:
    """The kernel's socket, with what was said on it: datagrams with their senders' ports, or an error."""

    def __init__(self, *said: tuple[bytes, int] | OSError) -> None:
        self.said = list(said)

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        if not self.said:
            raise BlockingIOError
        said = self.said.pop(0)
        if isinstance(said, OSError):
            raise said
        return said[0], (said[1], 1)


def settling(folder: Path, *said: tuple[bytes, int] | OSError) -> Settling:
    return Settling(cast(socket.socket, Kernel(*said)), str(folder / "queue"))


async def test_who_is_not_the_kernel_sends_no_uevents_to_wait_for(tmp_path: Path) -> None:
    made = settling(tmp_path, (b"add@/x\0SEQNUM=7\0", 4711), (b"add@/y\0SEQNUM=8\0", 0), (b"add@/z\0", 0))
    made.read()
    assert (len(made.outstanding), made.outstanding.newest) == (1, 8)
    made.passed(8)
    await asyncio.wait_for(made.passed_on(), 5)


async def test_what_was_lost_is_given_up_once_udevd_has_no_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "_QUIET", 0.01)
    (tmp_path / "queue").touch()
    made = settling(tmp_path, (b"add@/x\0SEQNUM=7\0", 0), OSError(errno.ENOBUFS, "lost"))
    made.read()
    waiting = asyncio.create_task(made.passed_on())
    await asyncio.wait({waiting}, timeout=0.1)
    assert not waiting.done()  # udevd is busy
    (tmp_path / "queue").unlink()
    await asyncio.wait_for(waiting, 5)
    assert len(made.outstanding) == 0
