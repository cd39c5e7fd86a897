"""One connection to libvirt's embedded driver: what its errors become."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from hostpassd.errors import HypervisorRefused, HypervisorUnavailable, NoFreePort, UnplugPending, WholeCardOnly
from hostpassd.machines.connection import Connection, start_events


@pytest.fixture
def connection() -> Iterator[Connection]:
    start_events()
    opened = Connection("test:///default", lambda uuid, event: None, lambda reason: None)
    with contextlib.closing(opened):
        yield opened


@pytest.mark.parametrize(
    ("words", "kind", "remedy"),
    [
        ("operation failed: cannot hot unplug multifunction PCI device: hostdev0", WholeCardOnly, "live=false"),
        ("unable to execute QEMU command: Device ua-1 is already in the process of unplug", UnplugPending, ""),
        ("internal error: No more available PCI slots", NoFreePort, "pcie-root-port"),
        (
            "unsupported configuration: per-device boot elements cannot be used together with os/boot elements",
            HypervisorRefused,
            "leave the option boot-order out",
        ),
        ("may need \"multifunction='on'\" for the device on function 0", HypervisorRefused, ""),
        ("no room", HypervisorRefused, ""),
    ],
)
def test_a_refusal_that_is_acted_on_has_a_type_and_says_what_to_do(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, words: str, kind: type[HypervisorRefused], remedy: str
) -> None:
    def refuse(*_: Any) -> None:
        raise libvirt.libvirtError(words)

    monkeypatch.setattr(libvirt.virDomain, "attachDeviceFlags", refuse)
    uuid = connection.uuid_of("test")
    with pytest.raises(HypervisorRefused) as refused:
        connection.attach_live(uuid, "<hostdev/>")
    assert type(refused.value) is kind and refused.value.name == "HypervisorRefused"
    told = f"libvirt refused: {words}."
    assert str(refused.value).startswith(told) and remedy in str(refused.value)
    assert bool(remedy) == (str(refused.value) != told)


def test_what_cannot_be_opened_is_unavailable() -> None:
    start_events()
    with pytest.raises(HypervisorUnavailable, match="cannot be reached"):
        Connection("test:///no/such/file.xml", lambda uuid, event: None, lambda reason: None)
