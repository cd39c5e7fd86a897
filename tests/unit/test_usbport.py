"""Which ports share a socket, read from a tree like that of sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostpassd.host.usbport import port_name, read_peers, read_socket


class Tree:
    """The root hubs usb1 (USB 2) and usb2 (USB 3) of one controller."""

    def __init__(self, root: Path) -> None:
        self.controller = root / "0000:00:14.0"
        self.folders = {"usb1": self.hub("usb1", "480"), "usb2": self.hub("usb2", "10000")}

    def hub(self, name: str, speed: str) -> Path:
        folder = self.controller / name
        folder.mkdir(parents=True)
        (folder / "speed").write_text(speed + "\n")
        return folder

    def plug(self, name: str, speed: str = "5000") -> str:
        """A device in the port that NAME says; a path."""
        bus, _, ports = name.partition("-")
        above, _, number = ports.rpartition(".")
        hub = self.folders[f"{bus}-{above}" if above else f"usb{bus}"]
        folder = hub / name
        folder.mkdir()
        (folder / "speed").write_text(speed + "\n")
        self.folders[name] = folder
        (folder / "port").symlink_to(f"../{self.port(hub, number).relative_to(hub)}")
        return str(folder)

    def port(self, hub: Path, number: str) -> Path:
        """The folder of a hub's port."""
        interface = f"{hub.name[3:]}-0:1.0" if hub.name.startswith("usb") else f"{hub.name}:1.0"
        folder = hub / interface / f"{hub.name}-port{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "location").write_text("0x00000000\n")
        return folder

    def link(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        """Make two ports, (hub, number) each, the peers of each other."""
        ports = [self.port(self.folders[hub], number) for hub, number in (one, other)]
        for port, peer in (ports, reversed(ports)):
            (port / "peer").symlink_to(f"../../../{peer.relative_to(self.controller)}")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """With port 1 of either bus in one socket, port 2 of USB 3 in that of port 5, and port 3 alone."""
    made = Tree(tmp_path)
    made.link(("usb1", "1"), ("usb2", "1"))
    made.link(("usb1", "5"), ("usb2", "2"))
    return made


def test_a_root_hub_is_in_no_socket(tree: Tree) -> None:
    assert read_socket(str(tree.folders["usb2"])) == ""


@pytest.mark.parametrize(
    ("port", "socket"), [("1-1", "1-1"), ("2-1", "1-1"), ("1-5", "1-5"), ("2-2", "1-5"), ("2-3", "2-3"), ("1-4", "1-4")]
)
def test_the_sockets_of_a_controller(tree: Tree, port: str, socket: str) -> None:
    assert read_socket(tree.plug(port)) == socket


def test_behind_a_hub(tree: Tree) -> None:
    """Its halves are in one socket; the kernel links their ports."""
    tree.plug("2-2")
    tree.plug("1-5", "480")
    tree.link(("1-5", "4"), ("2-2", "4"))
    disk = tree.plug("2-2.4")
    assert read_peers(disk) == {"2-2.4": "1-5.4", "2-2": "1-5"}
    assert read_socket(disk) == "1-5.4"
    assert read_socket(tree.plug("1-5.4", "480")) == "1-5.4"


def test_behind_a_hub_whose_other_half_is_not_there_yet(tree: Tree) -> None:
    tree.plug("2-2")
    disk = tree.plug("2-2.4")
    assert read_socket(disk) == "1-5.4"
    tree.plug("1-5", "480")
    tree.link(("1-5", "4"), ("2-2", "4"))
    assert read_socket(disk) == "1-5.4"


def test_a_port_that_the_firmware_places_has_only_the_peer_that_it_has(tree: Tree) -> None:
    tree.plug("2-2")
    disk = tree.plug("2-2.4")
    (Path(disk) / "port/location").write_text("0x80000103\n")
    assert read_socket(disk) == "2-2.4"


def test_a_usb_2_device_behind_a_usb_3_hub_is_on_the_usb_2_half(tree: Tree) -> None:
    tree.plug("1-5", "480")
    assert read_socket(tree.plug("1-5.2", "12")) == "1-5.2"


def test_an_old_kernel_and_a_device_that_went(tmp_path: Path) -> None:
    hub = tmp_path / "usb2"
    (hub / "2-1").mkdir(parents=True)
    (hub / "speed").write_text("5000\n")
    assert read_socket(str(hub / "2-1")) == "2-1"
    assert read_socket(str(tmp_path / "usb3/3-1.2")) == "3-1.2"
    (hub / "speed").write_text("unknown\n")
    assert read_socket(str(hub / "2-1")) == "2-1"


@pytest.mark.parametrize(
    ("folder", "name"),
    [("usb1-port2", "1-2"), ("usb12-port10", "12-10"), ("1-1-port3", "1-1.3"), ("1-1.4-port3", "1-1.4.3"), ("x", "")],
)
def test_port_names(folder: str, name: str) -> None:
    assert port_name(folder) == name
