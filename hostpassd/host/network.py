"""What the host does with its network interfaces. Pure but for sysfs."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from hostpassd.host.reading import Sysfs
from hostpassd.host.rtnetlink import Link, Network
from hostpassd.model.events import HostUse, Uses
from hostpassd.model.text import clean

_MASTERS = {"bridge": "bridge", "openvswitch": "bridge", "bond": "bond", "team": "bond"}
# macvtap is left out: it is a machine's, and shows as its hold.
_UPPERS = {"vlan": "vlan", "macvlan": "macvlan", "ipvlan": "macvlan"}

# Whose lower link is what they stand on; a veth's is its other end.
_ON_ANOTHER = frozenset({*_UPPERS, "macvtap"})


def network_uses(network: Network) -> Uses:
    """The uses of each interface, by its name."""
    by_index = {link.index: link for link in network.links}
    found: dict[str, dict[HostUse, None]] = {}
    for link in network.links:  # which can have one twice, as it was and as it is
        found.setdefault(link.name, {}).update(dict.fromkeys(_uses_of_link(link, by_index, network)))
    return {name: tuple(uses) for name, uses in found.items()}


def _uses_of_link(link: Link, by_index: dict[int, Link], network: Network) -> Iterator[HostUse]:
    yield from _carried(link, network)
    for upper, kind in _uppers(link, by_index):
        above = [use.detail for other in _all_above(upper, by_index) for use in _carried(other, network)]
        detail = clean(f"{upper.name} with {', '.join(dict.fromkeys(above))}" if above else upper.name)
        yield HostUse(kind, detail)


def _carried(link: Link, network: Network) -> Iterator[HostUse]:
    """The addresses and default routes on LINK itself."""
    for index, address in network.addresses:
        interface = ipaddress.ip_interface(address)
        if index == link.index and not interface.is_link_local and not interface.is_loopback:
            yield HostUse("address", address)
    for index, route in dict.fromkeys(network.default_routes):
        if index == link.index:
            yield HostUse("default-route", route)


def _uppers(link: Link, by_index: dict[int, Link]) -> Iterator[tuple[Link, str]]:
    """What uses LINK: the bridge or bond it is a member of, the VLANs on it; each with its kind of use."""
    master = by_index.get(link.master)
    if master and master.kind in _MASTERS:
        yield master, _MASTERS[master.kind]
    for other in by_index.values():
        if other.lower == link.index and other.index != link.index and other.kind in _UPPERS:
            yield other, _UPPERS[other.kind]


def _all_above(link: Link, by_index: dict[int, Link]) -> list[Link]:
    """LINK and all that stands on it."""
    found = [link]
    for known in found:
        found += [upper for upper, _ in _uppers(known, by_index) if upper not in found]
    return found


def lowest(link: Link, network: Network) -> list[str]:
    """The names of the interfaces that LINK stands on in the end: the members of a bridge or bond, a VLAN's parent."""
    found = [link]
    for known in found:
        lower = {known.lower} if known.kind in _ON_ANOTHER else set()
        found += [n for n in network.links if (n.master == known.index or n.index in lower) and n not in found]
    return [known.name for known in found]


def elsewhere(sysfs: Sysfs, nics: Iterable[str]) -> Uses:
    """The devices with interfaces in other network namespaces, a container's say: what they do there cannot be seen.

    Their folder of interfaces is there as long as they have one, and shows those of this namespace only.
    """
    hidden = [nic for nic in nics if sysfs.has(f"{nic}/net") and not sysfs.names(f"{nic}/net")]
    return {nic: (HostUse("namespace", "a network interface in another network namespace"),) for nic in hidden}
