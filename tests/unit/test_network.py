"""What the host does with its network interfaces."""

from __future__ import annotations

from pathlib import Path

from hostpassd.host.network import elsewhere, network_uses
from hostpassd.host.reading import Sysfs
from hostpassd.host.rtnetlink import Link, Network
from hostpassd.model.events import HostUse, host_use


def test_an_interface_in_another_namespace_is_a_use_of_its_device(tmp_path: Path) -> None:
    nic, away, unbound = (f"/sys/devices/pci0/0000:0{number}:00.0" for number in (1, 2, 3))
    for path in (f"{nic}/net/eth0", f"{away}/net", unbound):
        (tmp_path / path.removeprefix("/")).mkdir(parents=True)
    found = elsewhere(Sysfs(str(tmp_path / "sys")), (nic, away, unbound, "/sys/devices/gone"))
    assert found == {away: (host_use("upper-link", kinds=("netns",)),)}


def uses(network: Network, name: str) -> tuple[HostUse, ...]:
    return network_uses(network)[name]


def upper(interface: str, kind: str, addresses: tuple[str, ...] = (), routes: tuple[str, ...] = ()) -> HostUse:
    return host_use("upper-link", interfaces=(interface,), kinds=(kind,), addresses=addresses, routes=routes)


def test_addresses_and_the_default_route() -> None:
    network = Network(
        (Link(1, "lo"), Link(2, "eth0")),
        ((1, "127.0.0.1/8"), (2, "192.0.2.7/24"), (2, "fe80::1/64"), (2, "169.254.1.1/16"), (2, "2001:db8::1/64")),
        ((2, "default via 192.0.2.1"), (2, "default via 192.0.2.1")),
    )
    assert uses(network, "lo") == ()
    assert uses(network, "eth0") == (
        host_use("address", addresses=("192.0.2.7/24", "2001:db8::1/64")),
        host_use("default-route", routes=("default via 192.0.2.1",)),
    )


def test_a_member_carries_what_its_bridge_carries() -> None:
    links = (Link(2, "eth0", master=4), Link(3, "eth1", master=4), Link(4, "bond0", "bond", master=6),
             Link(5, "vlan7", "vlan", lower=4), Link(6, "br0", "bridge"))  # fmt: skip
    network = Network(links, ((6, "192.0.2.7/24"), (5, "198.51.100.1/24")), ((6, "default via 192.0.2.1"),))
    found = upper("bond0", "bond", ("192.0.2.7/24", "198.51.100.1/24"), ("default via 192.0.2.1",))
    assert uses(network, "eth0") == uses(network, "eth1") == (found,)


def test_vlans_and_macvlans_but_not_a_machines_macvtap() -> None:
    links = (Link(2, "eth0"), Link(3, "eth0.5", "vlan", lower=2), Link(4, "mv", "macvlan", lower=2),
             Link(5, "tap", "macvtap", lower=2), Link(6, "vrf", "vrf"), Link(7, "eth1", master=6))  # fmt: skip
    network = Network(links)
    assert uses(network, "eth0") == (upper("eth0.5", "vlan"), upper("mv", "macvlan"))
    assert uses(network, "eth1") == ()


def test_an_interface_that_is_told_as_it_was_and_as_it_is_has_the_uses_of_both() -> None:
    links = (Link(2, "eth0"), Link(2, "eth0", master=3), Link(3, "br0", "bridge"))
    for order in (links, links[::-1]):
        assert uses(Network(order), "eth0") == (upper("br0", "bridge"),)
