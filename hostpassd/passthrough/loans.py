"""Loans: devices that host drivers have lent to hypervisors, when each can be given back, and giving it back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import NamedTuple

from hostpassd.model import drivers
from hostpassd.model.device import Device
from hostpassd.passthrough.intents import IntentLog
from hostpassd.passthrough.steps import Libvirt
from hostpassd.passthrough.waiting import Patience, Waiting
from hostpassd.state import State
from hostpassd.state.eligibility import mates

# Seconds. VFIO lets go of a group, and libvirt of a managed device, a moment after libvirt's event.
_MOMENT = 2.0


class Idle(NamedTuple):
    """A device that is lent though no machine has its group any more, and the hypervisor that can give it back."""

    device: str
    uri: str


class Loans:
    """The devices that are lent to hypervisors by their host drivers, as the intent log has them.

    A driver can bind only when no machine has any member of the device's IOMMU group: so a device is given back when
    the last member is out, by whoever finds that, once.
    """

    def __init__(
        self,
        state: State,
        libvirt: Callable[[str], Libvirt],
        settle: Callable[[], Awaitable[None]],
        intents: IntentLog,
        waiting: Waiting,
    ) -> None:
        self._state = state
        self._libvirt = libvirt  # by hypervisor URI
        self._settle = settle
        self._intents = intents
        self._waiting = waiting

    @property
    def lent(self) -> Collection[str]:
        """The devices, by name."""
        return self._intents.lent.keys()

    def lender(self, device: str) -> str:
        """The hypervisor that has DEVICE, which is lent."""
        return self._intents.lent[device][0]

    def idle(self) -> list[Idle]:
        """What can be given back: a machine that was shut down has left it."""
        return [Idle(name, uri) for name, (uri, _) in self._intents.lent.items() if self.is_group_free(name)]

    async def lend(self, device: str, uri: str, driver: str) -> None:
        """Writes down that DEVICE is about to be taken from its host DRIVER. Error: StateFolderError."""
        await self._intents.lend(device, uri, driver)

    async def owe(self, devices: Iterable[str], uri: str) -> None:
        """Records DEVICES as lent before the first unplug request, as a guest may comply after the job has ended."""
        for device in devices:
            if device not in self._intents.lent:
                await self._intents.lend(device, uri, "")

    async def forgive(self, devices: Iterable[str]) -> None:
        """Takes back what `owe` has recorded: no guest was asked after all."""
        for device in devices:
            if self._intents.lent.get(device, ("", "known"))[1] == "":
                await self._intents.give_back(device)

    async def give_back(self, device: str, patience: Patience) -> None:
        """Gives DEVICE back to its host driver, if that is owed and can be, and waits until udev shows one."""
        await self._settle()
        if device not in self._intents.lent or not self.is_group_free(device):
            return
        if not self.has_host_driver(device):
            await self.reattach(device, self.lender(device), patience)
        await self._intents.give_back(device)

    async def reattach(self, device: str, uri: str, patience: Patience) -> None:
        """Has the hypervisor URI re-attach DEVICE; twice if VFIO still owned the group at the first driver probe."""
        libvirt = self._libvirt(uri)
        await patience.made(libvirt.reattach_host(device))
        await self._settle()
        here = self._state.device(device)
        if here and _is_stubbed(here):
            return  # where the administrator has it (driverctl, vfio-pci.ids)
        if not self.has_host_driver(device):
            await self._waiting.until(lambda: self.has_host_driver(device), Patience("", _MOMENT))
        if not self.has_host_driver(device):
            await patience.made(libvirt.reattach_host(device))
            await self._settle()

    async def drivers_back(self, devices: Iterable[str]) -> None:
        """Waits until DEVICES have host drivers again: libvirt gives a managed one back, a moment after its removal."""
        here = [name for name in devices if (device := self._state.device(name)) and device.pci]
        await self._waiting.until(
            lambda: all(self.has_host_driver(n) or not self.is_group_free(n) for n in here), Patience("", _MOMENT)
        )

    def has_host_driver(self, device: str) -> bool:
        """Whether a driver of the host's has DEVICE, or it is not here any more."""
        here = self._state.device(device)
        return here is None or (here.driver != "" and not _is_stubbed(here))

    def is_group_free(self, device: str) -> bool:
        """Whether no machine has a member of DEVICE's IOMMU group."""
        here = self._state.device(device)
        group = [device, *(mate.name for mate in (mates(self._state, here) if here else ()))]
        return not any(hold.live for name in group for hold in self._state.holds_on(name))


def _is_stubbed(device: Device) -> bool:
    """Whether the driver of DEVICE has it for somebody else. A variant driver of VFIO has a name of its own."""
    return device.driver in drivers.STUBS or bool(device.pci and device.pci.vfio_device)
