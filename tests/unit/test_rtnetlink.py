"""Dumps of the network, by netlink's own rules."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.host import rtnetlink
from hostpassd.host.rtnetlink import Link


def test_rtnetlink_reads_this_hosts_loopback() -> None:
    network = rtnetlink.read()
    assert Link(1, "lo") in network.links


def link_row(index: int, name: str, master: int = 0) -> bytes:
    attributes = struct.pack(f"=HH{-(-len(name) // 4) * 4}s", 4 + len(name), 3, name.encode())
    return struct.pack("=BxHiII", 0, 1, index, 0, 0) + attributes + struct.pack("=HHI", 8, 10, master)


def test_a_network_that_keeps_changing_is_all_that_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    told = [(link_row(2, "eth0"),), (link_row(2, "eth0", 3), link_row(3, "br0")), (link_row(4, "veth7"),)]
    left = iter(told * 4)

    def dump(request: int, payload: bytes) -> rtnetlink.Dump:
        return rtnetlink.Dump(next(left) if request == rtnetlink.GET_LINK else (), whole=False)

    monkeypatch.setattr(rtnetlink, "dump_once", dump)
    network = rtnetlink.read()
    assert not network.whole
    assert network.links == (Link(2, "eth0"), Link(2, "eth0", master=3), Link(3, "br0"), Link(4, "veth7"))


class Netlink:
    """A netlink socket that hears what it is told to: datagrams with their senders."""

    def __init__(self, *datagrams: tuple[bytes, int]) -> None:
        self._datagrams = list(datagrams)

    def __enter__(self) -> Netlink:
        return self

    def __exit__(self, *_: object) -> None: ...

    def settimeout(self, seconds: float) -> None: ...

    def send(self, data: bytes) -> None: ...

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        if not self._datagrams:
            raise BlockingIOError
        data, sender = self._datagrams.pop(0)
        return data, (sender, 0)


def netlink_message(kind: int, body: bytes, flags: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


DONE = netlink_message(3, struct.pack("=i", 0))


@pytest.mark.parametrize(
    ("datagrams", "dump"),
    [
        ([(netlink_message(16, b"row!") + DONE, 0)], rtnetlink.Dump((b"row!",), True)),
        ([(netlink_message(16, b"evil") + DONE, 77), (netlink_message(16, b"row!"), 0), (DONE, 0)],
         rtnetlink.Dump((b"row!",), True)),
        ([(netlink_message(16, b"row!", 0x12) + DONE, 0)], rtnetlink.Dump((b"row!",), False)),
        ([(netlink_message(16, b"row!") + netlink_message(3, struct.pack("=i", -11)), 0)],
         rtnetlink.Dump((b"row!",), False)),
        ([(netlink_message(2, struct.pack("=i", -16)), 0)], rtnetlink.Dump((), False)),
    ],
)  # fmt: skip
def test_only_the_kernel_is_heard_and_it_says_when_a_dump_is_not_whole(
    monkeypatch: pytest.MonkeyPatch, datagrams: list[tuple[bytes, int]], dump: rtnetlink.Dump
) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_: Netlink(*datagrams))
    assert rtnetlink.dump_once(rtnetlink.GET_LINK, b"") == dump


def test_the_kernels_other_errors_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = netlink_message(2, struct.pack("=i", -1))
    monkeypatch.setattr(socket, "socket", lambda *_: Netlink((refused, 0)))
    with pytest.raises(PermissionError):
        rtnetlink.dump_once(rtnetlink.GET_LINK, b"")


def test_netlink_attributes() -> None:
    data = struct.pack("=HH4s", 7, 3, b"lo\0") + struct.pack("=HHI", 8, 10 | 0x8000, 5)
    assert rtnetlink.parse_attributes(data) == {3: b"lo\0", 10: struct.pack("=I", 5)}


@given(st.binary())
def test_netlink_attributes_that_are_cut_short(data: bytes) -> None:
    rtnetlink.parse_attributes(data)
