"""When udevd has passed on what the kernel has sent: by the sequence numbers of uevents."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import socket
from collections.abc import Iterator

log = logging.getLogger(__name__)

_RECEIVE_BUFFER = 128 << 20  # bytes; what udev itself asks for
_QUIET = 0.5  # seconds between two looks at udevd's queue
_KNOWN_LIMIT = 100_000  # uevents waited for; past it they are counted as lost

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1
_SO_RCVBUFFORCE = 33


@dataclasses.dataclass(slots=True)
class Awaited:
    """The uevents that one caller waits for."""

    numbers: set[int]
    all_passed: asyncio.Event

    def drop(self, numbers: set[int]) -> None:
        """Wait for these no more."""
        self.numbers -= numbers
        if not self.numbers:
            self.all_passed.set()

    async def wait(self, seconds: float) -> None:
        """Wait until all have been passed on, or that long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.all_passed.wait(), seconds)


class Outstanding:
    """Which of the kernel's uevents udevd has not passed on yet, by sequence number.

    udevd passes every uevent on once, whatever becomes of its rules, in an order of its own. Either of the two
    messages may be read here first.
    """

    def __init__(self) -> None:
        self.passed_on = 0  # how many
        self.newest = 0
        self._waiting: set[int] = set()
        self._early: set[int] = set()
        self._awaited: list[Awaited] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def sent(self, number: int) -> None:
        """The kernel sent this one."""
        self.newest = max(self.newest, number)
        if number in self._early:
            self._early.remove(number)
        else:
            self._waiting.add(number)

    def passed(self, number: int) -> None:
        """udevd passed this one on, and it has been dealt with."""
        self.passed_on += 1
        if number in self._waiting:
            self._drop({number})
        else:
            self._early.add(number)

    def caught_up(self) -> None:
        """All that the kernel sent so far is known: what is early and no newer was sent before this began."""
        self._early = {number for number in self._early if number > self.newest} if self._early else self._early

    def forget(self, up_to: int) -> None:
        """These never come: they were lost."""
        self._drop({number for number in self._waiting if number <= up_to})

    def _drop(self, numbers: set[int]) -> None:
        self._waiting -= numbers
        for awaited in self._awaited:
            awaited.drop(numbers)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[Awaited]:
        """All that are outstanding now, kept up to date within the context."""
        awaited = Awaited(set(self._waiting), asyncio.Event())
        self._awaited.append(awaited)
        try:
            yield awaited
        finally:
            self._awaited.remove(awaited)


class Settling:
    """Compares what comes by KERNEL, the kernel's own socket, with what udevd passes on. QUEUE: udevd's file for it."""

    def __init__(self, kernel: socket.socket, queue: str) -> None:
        self._kernel = kernel
        self._queue = queue
        self.outstanding = Outstanding()
        self._lost = self._udevd_is_busy()  # uevents not known here may still be in udevd's queue

    def passed(self, number: int) -> None:
        """udevd has passed this uevent on, and it has been dealt with."""
        self.outstanding.passed(number)

    def lose(self) -> None:
        """Some uevents were not heard."""
        self._lost = True

    def read(self) -> None:
        """Note what the kernel has sent."""
        while True:
            try:
                message, (port, _) = self._kernel.recvfrom(8192)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._lost = True
                continue
            number = 0 if port else _number_in(message)  # of the kernel's own port; others can send to the group, too
            if number:
                self.outstanding.sent(number)
        self.outstanding.caught_up()
        if len(self.outstanding) > _KNOWN_LIMIT:
            self.outstanding.forget(self.outstanding.newest)
            self._lost = True

    async def passed_on(self) -> None:
        """Return when udevd has passed on, and `passed` was called for, all that the kernel had sent before.

        What was lost on the way (an overflow, a restart of udevd) never comes: it is given up when udevd has no
        queue and has sent nothing since the last look, at which it had none either.
        """
        with self.outstanding.awaited() as awaited:
            last = None
            while awaited.numbers or self._lost:
                if awaited.numbers:
                    await awaited.wait(_QUIET)
                else:
                    await asyncio.sleep(_QUIET)
                look = None if self._udevd_is_busy() else (self.outstanding.passed_on, self.outstanding.newest)
                if look and last and look[0] == last[0]:
                    self.outstanding.forget(last[1])
                    self._lost = False
                last = look

    def _udevd_is_busy(self) -> bool:
        return os.path.exists(self._queue)  # udevd keeps this file while it has something queued

    def close(self) -> None:
        """Listen no more."""
        self._kernel.close()


def kernel_socket() -> socket.socket:
    """The kernel's own uevents, only to know their numbers."""
    kernel = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, _NETLINK_KOBJECT_UEVENT
    )
    enlarge(kernel)
    kernel.bind((0, _KERNEL_GROUP))
    return kernel


def enlarge(handle: socket.socket) -> None:
    """Give HANDLE udev's own receive buffer if that is more than it has (the kernel tells twice what was set)."""
    if handle.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) >= 2 * _RECEIVE_BUFFER:
        return
    try:
        handle.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    except PermissionError:
        log.debug("no CAP_NET_ADMIN: the receive buffer of uevents stays small")


def _number_in(message: bytes) -> int:
    """The sequence number in a uevent; 0 if there is none."""
    _, found, rest = message.rpartition(b"\0SEQNUM=")
    digits = rest.partition(b"\0")[0]
    return int(digits) if found and digits.isdigit() else 0
