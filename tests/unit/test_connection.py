"""One connection to libvirt: what its words become."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import libvirt
import pytest

from hostpassd.errors import HypervisorRefused, NoFreePort, UnplugPending, WholeCardOnly
from hostpassd.machines.connection import Connection, start_events

GUEST = "6695eb01-f6a4-8304-79aa-97f2502e193f"  # of libvirt's own test:///default

# Words of libvirt's, and what they are.
SAID = {
    "operation failed: cannot hot unplug multifunction PCI device: hostdev0": WholeCardOnly,
    "internal error: unable to execute QEMU command 'device_del': Device x is already in the process of unplug": (
        UnplugPending
    ),
    "internal error: No more available PCI slots": NoFreePort,
    "operation failed: something else": HypervisorRefused,
}


class Refusal(libvirt.libvirtError):  # type: ignore[misc]
    """As libvirt raises it, without an error of its own behind it."""

    def get_error_message(self) -> str:
        return str(self.args[0])

    def get_error_code(self) -> int:
        return int(libvirt.VIR_ERR_OPERATION_FAILED)


@pytest.fixture
def connection() -> Iterator[Connection]:
    start_events()
    opened = Connection("test:///default", lambda uuid, event: None, lambda reason: None)
    yield opened
    opened.close()


@pytest.mark.parametrize("words", SAID)
def test_what_others_have_to_tell_apart_has_a_type_and_libvirts_words_stay(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    def refuse(self: Any, xml: str, flags: int) -> None:
        raise Refusal(words)

    monkeypatch.setattr(libvirt.virDomain, "attachDeviceFlags", refuse)
    with pytest.raises(HypervisorRefused) as refused:
        connection.attach_live(GUEST, "<hostdev/>")
    assert type(refused.value) is SAID[words] and words in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(("words", "what_to_do"), [("multifunction", "live=false"), ("PCI slots", "pcie-root-port")])
def test_it_is_said_what_to_do_where_libvirts_words_do_not(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, words: str, what_to_do: str
) -> None:
    def refuse(self: Any, xml: str, flags: int) -> None:
        raise Refusal(words)

    monkeypatch.setattr(libvirt.virDomain, "attachDeviceFlags", refuse)
    with pytest.raises(HypervisorRefused, match=what_to_do):
        connection.attach_live(GUEST, "<hostdev/>")
