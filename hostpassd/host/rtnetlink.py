"""Links, addresses and default routes, as rtnetlink dumps them. Blocking, some milliseconds.

By hand and not by pyroute2: importing any part of that costs 16 MB and half a second, for three dumps.
"""

from __future__ import annotations

import dataclasses
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator

from hostpassd.model.text import clean

_MESSAGE = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_LINK = struct.Struct("=BxHiII")  # family, hardware type, index, flags, changed flags
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, destination and source lengths, tos, table, protocol, scope, type, flags
_HOP = struct.Struct("=HBBi")  # length, flags, hops, index

_ERROR, _DONE = 2, 3
GET_LINK, _GET_ADDRESS, _GET_ROUTE = 18, 22, 26
_REQUEST, _DUMP, _INTERRUPTED = 0x1, 0x300, 0x10
_SEQUENCE = 1
_BUSY = (errno.EAGAIN, errno.EBUSY, errno.EINTR)
_TYPE_MASK = 0x3FFF  # without the flags for nested attributes and byte order

_LINK_NAME, _LINK_LOWER, _LINK_MASTER, _LINK_INFO, _LINK_LOWER_NAMESPACE = 3, 5, 10, 18, 37
_INFO_KIND = 1
_ADDRESS_PEER, _ADDRESS_LOCAL = 1, 2
_ROUTE_OUT, _ROUTE_GATEWAY, _ROUTE_HOPS = 4, 5, 9
_UNICAST = 1

_TIMEOUT = 5.0  # seconds without a word from the kernel
_ATTEMPTS = 5

# The multicast groups that tell of links, addresses and routes.
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400

Attributes = dict[int, bytes]


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """A network interface."""

    index: int
    name: str
    kind: str = ""  # bridge, bond, vlan ...; '' for hardware
    master: int = 0  # the bridge or bond it is a member of; 0: none
    lower: int = 0  # what it stands on, in this network namespace; 0: nothing


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """What an interface can be used for. Addresses and default routes as (interface index, text)."""

    links: tuple[Link, ...]
    addresses: tuple[tuple[int, str], ...] = ()
    default_routes: tuple[tuple[int, str], ...] = ()
    whole: bool = True  # False: it changed all the while; what is in here was there at one time or another


@dataclasses.dataclass(frozen=True, slots=True)
class Dump:
    """What the kernel has of one kind."""

    rows: tuple[bytes, ...]
    whole: bool


def read() -> Network:
    """The network of this namespace now. Raises OSError."""
    links = _dump(GET_LINK, _LINK.pack(0, 0, 0, 0, 0))
    addresses = _dump(_GET_ADDRESS, _ADDRESS.pack(0, 0, 0, 0, 0))
    routes = _dump(_GET_ROUTE, _ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0))
    return Network(
        tuple(_links(links.rows)),
        tuple(_addresses(addresses.rows)),
        tuple(_default_routes(routes.rows)),
        links.whole and addresses.whole and routes.whole,
    )


def _links(rows: Iterable[bytes]) -> Iterator[Link]:
    for payload in rows:
        index = _LINK.unpack_from(payload)[2]
        attributes = parse_attributes(payload[_LINK.size :])
        elsewhere = _LINK_LOWER_NAMESPACE in attributes
        yield Link(
            index=index,
            name=os.fsdecode(attributes.get(_LINK_NAME, b"").rstrip(b"\0")),
            kind=clean(parse_attributes(attributes.get(_LINK_INFO, b"")).get(_INFO_KIND, b"").rstrip(b"\0")),
            master=_index(attributes.get(_LINK_MASTER)),
            lower=0 if elsewhere else _index(attributes.get(_LINK_LOWER)),
        )


def _addresses(rows: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    for payload in rows:
        _, length, _, _, index = _ADDRESS.unpack_from(payload)
        attributes = parse_attributes(payload[_ADDRESS.size :])
        address = attributes.get(_ADDRESS_LOCAL) or attributes.get(_ADDRESS_PEER, b"")
        if len(address) in (4, 16):
            yield index, f"{ipaddress.ip_address(address)}/{length}"


def _default_routes(rows: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    for payload in rows:
        route = _ROUTE.unpack_from(payload)
        if route[1] == 0 and route[7] == _UNICAST:
            yield from _hops(parse_attributes(payload[_ROUTE.size :]))


def _hops(attributes: Attributes) -> Iterator[tuple[int, str]]:
    if _ROUTE_OUT in attributes:
        yield _index(attributes[_ROUTE_OUT]), _via(attributes.get(_ROUTE_GATEWAY, b""))
    hops = attributes.get(_ROUTE_HOPS, b"")
    while len(hops) >= _HOP.size:
        length, _, _, index = _HOP.unpack_from(hops)
        yield index, _via(parse_attributes(hops[_HOP.size : length]).get(_ROUTE_GATEWAY, b""))
        hops = hops[max(length, _HOP.size) :]


def _via(gateway: bytes) -> str:
    return f"default via {ipaddress.ip_address(gateway)}" if len(gateway) in (4, 16) else "default"


def _index(value: bytes | None) -> int:
    return int.from_bytes(value, "little" if _LITTLE else "big") if value else 0


_LITTLE = struct.pack("=H", 1)[0] == 1


def parse_attributes(data: bytes) -> Attributes:
    """Netlink attributes by type; what is cut short is left out."""
    attributes: Attributes = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= length <= len(data):
            break
        attributes[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : length]
        data = data[-(-length // 4) * 4 :]
    return attributes


def _dump(request: int, payload: bytes) -> Dump:
    """What the kernel has of that kind; asked anew if it changed while it was told.

    Where it changes all the while (containers come and go) it is all that was told in any attempt: a use that is over
    by now is better than one that is not seen.
    """
    rows: dict[bytes, None] = {}
    for _ in range(_ATTEMPTS):
        found = dump_once(request, payload)
        if found.whole:
            return found
        rows |= dict.fromkeys(found.rows)
    return Dump(tuple(rows), whole=False)


def dump_once(request: int, payload: bytes) -> Dump:
    """What the kernel has of that kind (RTM_GETLINK and its like); not whole if it changed meanwhile."""
    rows: list[bytes] = []
    whole = True
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as netlink:
        netlink.settimeout(_TIMEOUT)
        netlink.send(_MESSAGE.pack(_MESSAGE.size + len(payload), request, _REQUEST | _DUMP, _SEQUENCE, 0) + payload)
        while True:
            data, (sender, _) = netlink.recvfrom(1 << 17)
            for kind, flags, body in _messages(data) if sender == 0 else ():  # who may can send to the port of others
                whole = whole and not flags & _INTERRUPTED
                if kind in (_DONE, _ERROR):
                    error = -struct.unpack_from("=i", body)[0] if len(body) >= 4 else 0
                    if error not in (0, *_BUSY):
                        raise OSError(error, os.strerror(error))
                    return Dump(tuple(rows), whole and error == 0)
                rows.append(body)


def _messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    while len(data) >= _MESSAGE.size:
        length, kind, flags, _, _ = _MESSAGE.unpack_from(data)
        yield kind, flags, data[_MESSAGE.size : length]
        data = data[max(_MESSAGE.size, -(-length // 4) * 4) :]
