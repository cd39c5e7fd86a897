"""Machines inside the lab's host: nested guests that run a real Linux and answer for the devices handed to them."""

from __future__ import annotations

import shlex
import uuid

from tests.lab.machine import PATIENCE, Host, Result

LOGS = "/var/log/libvirt/qemu"
SOCKETS = "/var/lib/libvirt/qemu"
BOOT = "/var/lib/libvirt/boot"


class Guest:
    """One libvirt domain: a q35 with so many empty root ports and the controllers that were asked for.

    With a kernel it is a Linux that answers hot-plug and hot-unplug and takes commands on its console; without
    one it never lets go of a device.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        root_ports: int = 5,
        conventional_bridge: bool = True,
        kernel: bool = True,
        scsi: bool = True,
        usb: bool = True,
        memory: int = 512,
        persistent: bool = True,
        devices: str = "",
    ) -> None:
        self.host = host
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.persistent = persistent
        self.log = f"{LOGS}/{name}-console.log"
        self.socket = f"{SOCKETS}/{name}-console.sock"
        self.xml = self._xml(root_ports, conventional_bridge, kernel, scsi, usb, memory, devices)

    # --- life ---

    def define(self) -> None:
        """Stores the domain; a machine that is not persistent has nothing to store."""
        if self.persistent:
            self.host.run("virsh -q define /dev/stdin", input=self.xml)

    def start(self) -> None:
        """Switches the machine on; its kernel is not up before wait_up() returns."""
        if self.persistent:
            self.host.run(f"virsh -q start {self.name}")
        else:
            self.host.run("virsh -q create /dev/stdin", input=self.xml)

    def wait_up(self, timeout: float = PATIENCE) -> None:
        """Returns when the guest's kernel runs and its shell answers."""
        self.wait_sees("guest is up", timeout)

    def destroy(self) -> None:
        """Switches the machine off, as by its power button held down."""
        self.host.run(f"virsh -q destroy {self.name}")

    def undefine(self) -> None:
        """Forgets the stored domain."""
        self.host.run(f"virsh -q undefine {self.name}")

    def clean_up(self) -> None:
        """Leaves nothing of the machine, in whatever state it is."""
        self.host.run(f"virsh -q destroy {self.name}; virsh -q undefine {self.name}; rm -f {self.log}", check=False)

    def running(self) -> bool:
        return self.host.run(f"virsh -q domstate {self.name}", check=False).stdout.strip() == "running"

    # --- what libvirt says ---

    def live_xml(self) -> str:
        """The machine as it runs now."""
        return self.host.run(f"virsh dumpxml {self.name}").stdout

    def stored_xml(self) -> str:
        """The machine as it will be at its next start."""
        return self.host.run(f"virsh dumpxml --inactive {self.name}").stdout

    def attach(self, xml: str, flags: str = "--live", check: bool = True) -> Result:
        """Hands over a device by virsh, as somebody else than hostpassd would."""
        return self.host.run(f"virsh attach-device {self.name} /dev/stdin {flags}", input=xml, check=check)

    def detach(self, xml: str, flags: str = "--live", check: bool = True) -> Result:
        """Takes a device back by virsh; libvirt may say so before the guest has let go."""
        return self.host.run(f"virsh detach-device {self.name} /dev/stdin {flags}", input=xml, check=check)

    # --- what the guest says ---

    def messages(self) -> str:
        """What the guest wrote on its console since it was switched on."""
        return self.host.run(f"cat {self.log}", check=False).stdout

    def sees(self, pattern: str) -> bool:
        """Whether the guest's kernel has said something that an extended regular expression finds."""
        return self.host.run(f"grep -Eq -e {shlex.quote(pattern)} {self.log}", check=False).status == 0

    def wait_sees(self, pattern: str, timeout: float = PATIENCE) -> None:
        """Waits until the guest's kernel has said it."""
        try:
            self.host.wait_for(f"grep -Eq -e {shlex.quote(pattern)} {self.log}", timeout, interval=0.5)
        except TimeoutError as error:
            error.add_note(f"The guest's last words:\n{self.messages()[-2000:]}")
            raise

    def run(self, command: str, check: bool = True, timeout: float = PATIENCE) -> Result:
        """Runs a shell command in the guest, over its console."""
        typed = f"python3 /opt/lab/console.py {self.socket} {timeout:g} {shlex.quote(command)}"
        return self.host.run(typed, check=check, timeout=timeout + 10)

    # --- what it is ---

    def _xml(
        self, root_ports: int, conventional: bool, kernel: bool, scsi: bool, usb: bool, memory: int, devices: str
    ) -> str:
        boot = f"<kernel>{BOOT}/vmlinuz</kernel><initrd>{BOOT}/initrd</initrd><cmdline>{COMMAND_LINE}</cmdline>"
        controllers = ["<controller type='pci' index='0' model='pcie-root'/>"]
        for port in range(1, root_ports + 1):
            controllers.append(f"<controller type='pci' index='{port}' model='pcie-root-port'/>")
        if conventional:
            port = root_ports + 1
            controllers.append(f"<controller type='pci' index='{port}' model='pcie-root-port'/>")
            place = f"<address type='pci' domain='0x0000' bus='{port:#04x}' slot='0x00' function='0x0'/>"
            controllers.append(
                f"<controller type='pci' index='{port + 1}' model='pcie-to-pci-bridge'>{place}</controller>"
            )
        if usb:
            controllers.append(f"<controller type='usb' model='qemu-xhci' ports='8'>{_on_root(0x1D)}</controller>")
        else:
            controllers.append("<controller type='usb' model='none'/>")
        if scsi:
            controllers.append(f"<controller type='scsi' model='virtio-scsi'>{_on_root(0x1E)}</controller>")
        return f"""
            <domain type='kvm'>
              <name>{self.name}</name>
              <uuid>{self.uuid}</uuid>
              <memory unit='MiB'>{memory}</memory>
              <vcpu>1</vcpu>
              <os><type arch='x86_64' machine='q35'>hvm</type>{boot if kernel else ""}</os>
              <features><acpi/><apic/></features>
              <devices>
                <emulator>/usr/bin/qemu-system-x86_64</emulator>
                {"".join(controllers)}
                <controller type='virtio-serial' index='0'>{_on_root(0x1B)}</controller>
                <console type='unix'>
                  <source mode='bind' path='{self.socket}'/>
                  <log file='{self.log}' append='off'/>
                  <target type='virtio'/>
                </console>
                <memballoon model='none'/>
                {devices}
              </devices>
            </domain>
        """


# A paravirtual console: every byte on a serial port costs the nested guest two trips out of its machine.
COMMAND_LINE = "console=hvc0 loglevel=7 panic=1 mitigations=off nokaslr no_timer_check audit=0"


def _on_root(slot: int) -> str:
    """A place on the guest's PCI root, so that the root ports stay empty."""
    return f"<address type='pci' domain='0x0000' bus='0x00' slot='{slot:#04x}' function='0x0'/>"


def pci_hostdev(address: str, managed: bool = True, extra: str = "") -> str:
    """The hostdev of a PCI device at an address such as 0000:01:00.0."""
    domain, bus, slot_function = address.split(":")
    slot, function = slot_function.split(".")
    place = f"domain='0x{domain}' bus='0x{bus}' slot='0x{slot}' function='0x{function}'"
    return (
        f"<hostdev mode='subsystem' type='pci' managed='{'yes' if managed else 'no'}'>"
        f"<source><address {place}/></source>{extra}</hostdev>"
    )


def usb_hostdev(vendor: int, product: int, bus: int | None = None, number: int | None = None, extra: str = "") -> str:
    """The hostdev of a USB device by vendor and product, and by bus and number where they are given."""
    place = "" if bus is None else f"<address bus='{bus}' device='{number}'/>"
    return (
        "<hostdev mode='subsystem' type='usb' managed='yes'><source>"
        f"<vendor id='{vendor:#06x}'/><product id='{product:#06x}'/>{place}</source>{extra}</hostdev>"
    )


def scsi_hostdev(host: int, channel: int, target: int, lun: int, extra: str = "") -> str:
    """The hostdev of a SCSI logical unit."""
    return (
        "<hostdev mode='subsystem' type='scsi'><source>"
        f"<adapter name='scsi_host{host}'/><address bus='{channel}' target='{target}' unit='{lun}'/>"
        f"</source>{extra}</hostdev>"
    )
