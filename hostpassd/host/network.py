"""What the host does with its network interfaces. Pure but for sysfs."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator

from hostpassd.host.reading import Sysfs
from hostpassd.host.rtnetlink import Link, Network
from hostpassd.model.events import HostUse, Uses, host_use
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
    addresses, routes = _carried([link], network)
    if addresses:
        yield host_use("address", addresses=addresses)
    if routes:
        yield host_use("default-route", routes=routes)
    for upper, kind in _uppers(link, by_index):
        addresses, routes = _carried(_all_above(upper, by_index), network)
        name = clean(upper.name)
        yield host_use("upper-link", interfaces=(name,), kinds=(kind,), addresses=addresses, routes=routes)


def _carried(links: Iterable[Link], network: Network) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The addresses and the default routes on LINKS themselves."""
    here = {link.index for link in links}
    addresses = {address for index, address in network.addresses if index in here and _counts(address)}
    return tuple(sorted(addresses)), tuple(sorted({route for index, route in network.default_routes if index in here}))


def _counts(address: str) -> bool:
    interface = ipaddress.ip_interface(address)
    return not interface.is_link_local and not interface.is_loopback


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
    return {nic: (host_use("upper-link", kinds=("netns",)),) for nic in hidden}
