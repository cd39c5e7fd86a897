"""./dev run: a private bus of type system, the daemon on it, and what it says of this host, or of a simulated one.

Nothing on the host is changed: the daemon reads udev, and the host's libvirt if there is one, else libvirt's embedded
driver, whose machines live in the daemon's memory alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from dbus_next import Message, MessageType
from dbus_next.aio import MessageBus

from tests.bus.busd import BusDidNotStart, PrivateBus, hang_up
from tests.bus.mockhost import MockHost
from tests.sim import demo

NAME, ROOT, MANAGER_PATH = "org.hostpassd1", "/org/hostpassd1", "/org/hostpassd1/manager"
POLKIT = "org.freedesktop.PolicyKit1"
LIBVIRT_SOCKETS = ("/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock")
EMBEDDED = "test:///default"
PATIENCE = 60  # seconds for the daemon to own its name


class Failed(Exception):
    """What did not work, in a sentence."""


class Front:
    """A client of the daemon."""

    def __init__(self, bus: Any) -> None:
        self._bus = bus

    async def call(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", *body: Any
    ) -> Any:
        message = Message(destination, path, interface, member, signature=signature, body=list(body))
        reply = await self._bus.call(message)
        if reply.message_type is MessageType.ERROR:
            raise Failed(f"{member}: {reply.error_name}: {reply.body[0] if reply.body else ''}")
        return reply.body[0] if reply.body else None

    async def manager(self, member: str, signature: str = "", *body: Any) -> Any:
        return await self.call(NAME, MANAGER_PATH, NAME + ".Manager", member, signature, *body)

    async def wait_for_name(self, daemon: asyncio.subprocess.Process) -> None:
        """Returns when the daemon owns its name."""
        owned = asyncio.Event()
        self._bus.add_message_handler(
            lambda m: owned.set() if m.member == "NameOwnerChanged" and m.body[0] == NAME else None
        )
        bus = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")
        await self.call(*bus, "AddMatch", "s", f"type='signal',member='NameOwnerChanged',arg0='{NAME}'")
        if await self.call(*bus, "NameHasOwner", "s", NAME):
            return
        tasks = {asyncio.ensure_future(owned.wait()), asyncio.ensure_future(daemon.wait())}
        await asyncio.wait(tasks, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        if not owned.is_set():
            raise Failed("The daemon did not start: its own words are above.")

    async def objects(self) -> dict[str, dict[str, Any]]:
        """All objects, each with the values of all its interfaces."""
        managed = await self.call(NAME, ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects")
        return {
            path: {k: v.value for props in ifaces.values() for k, v in props.items()}
            for path, ifaces in managed.items()
        }


def print_tree(objects: dict[str, dict[str, Any]]) -> None:
    """The devices as a tree: label, driver, who holds each, and why it cannot be assigned."""
    names = {path: row["Name"] for path, row in objects.items() if "/machines/" in path}

    def show(path: str, depth: int) -> None:
        row = objects[path]
        driver = f" [{row['Driver']}]" if row["Driver"] else ""
        print(f"{'  ' * depth}{row['Name']}{driver}  {row['Label']}")
        for machine, hold in row["Holders"]:
            halves = [half for half in ("live", "config") if hold[half].value]
            print(f"{'  ' * depth}    held by {names.get(machine, machine)} ({', '.join(halves)})")
        if row["Assignable"]:
            print(f"{'  ' * depth}    can be assigned")
        elif row["Kind"] in ("pci", "usb", "scsi", "mdev"):
            for _, code, severity, _, message in row["Blockers"]:
                print(f"{'  ' * depth}    {code} ({severity}): {message}")
        for child in row["Children"]:
            show(child, depth + 1)

    devices = {path for path in objects if "/devices/" in path}
    for path in sorted(devices):
        if objects[path]["Parent"] == "/":
            show(path, 0)
    free = sum(1 for path in devices if objects[path]["Assignable"])
    print(f"{counted(len(devices), 'device')}, {free} of them can be assigned; {counted(len(names), 'machine')}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


async def stand_in_for_polkit(address: str) -> MessageBus:
    """Has everybody on the private bus allowed everything: the host is made up, and polkitd need not be installed."""
    bus = await MessageBus(bus_address=address).connect()
    bus.add_message_handler(
        lambda m: (
            Message.new_method_return(m, "(bba{ss})", [[True, False, {}]]) if m.member == "CheckAuthorization" else None
        )
    )
    await bus.request_name(POLKIT)
    return bus


async def demonstrate(front: Front) -> None:
    """An assign into a running machine and a dismiss, on the simulated host: its guest refuses the first time."""
    device = f"{ROOT}/devices/pci_0000_01_00_0"
    for member in ("Assign", "Dismiss", "Dismiss"):
        try:
            told = f"{await front.manager(member, 'sasa{sv}', 'web', ['01:00.0'], {})} is done"
        except Failed as refusal:
            told = str(refusal).removeprefix(f"{member}: ").rstrip(".")
        driver = (await front.objects())[device]["Driver"]
        print(f"{member} web 01:00.0: {told}; its driver is {driver} now", flush=True)


async def show(arguments: argparse.Namespace, daemon: asyncio.subprocess.Process, address: str, uri: str) -> int:
    """Shows what the daemon says, and, unless it is told to do it once, returns only when that ends."""
    if not arguments.simulated:
        return await show_all(arguments, daemon, address, uri)
    polkit = await stand_in_for_polkit(address)
    try:
        return await show_all(arguments, daemon, address, uri)
    finally:
        hang_up(polkit)


async def show_all(arguments: argparse.Namespace, daemon: asyncio.subprocess.Process, address: str, uri: str) -> int:
    """What `show` does, when it is settled who may do what."""
    front = Front(await MessageBus(bus_address=address).connect())
    await front.wait_for_name(daemon)
    print_tree(await front.objects())
    if uri == EMBEDDED:
        print("No libvirt runs here, so its embedded driver is asked, with one machine that is in memory alone.")
    if arguments.simulated:
        await demonstrate(front)
    busctl = ["busctl", f"--address={address}"]
    state = [*busctl, "get-property", NAME, MANAGER_PATH, NAME + ".Manager", "State"]
    print("$ " + shlex.join(state), flush=True)
    if await (await asyncio.create_subprocess_exec(*state)).wait():
        raise Failed("busctl did not reach the daemon: its own words are above.")
    if arguments.once:
        return 0
    print(f"hostpassd answers there (hypervisor {uri}); try: {shlex.join([*busctl, 'tree', NAME])}")
    print("Front ends find it there, too, when they are started in a shell after this line:")
    print(f"export DBUS_SYSTEM_BUS_ADDRESS={shlex.quote(address)}")
    print("Ctrl-C ends it.", flush=True)
    raise Failed(f"The daemon has ended by itself, with status {await daemon.wait()}.")


async def serve(arguments: argparse.Namespace, address: str, environment: dict[str, str], uri: str, folder: str) -> int:
    """Runs the daemon and shows what it says. Whatever that is at, a signal ends it."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if arguments.simulated:
        command = ["tests.sim.demo", address, f"{folder}/state"]
    else:
        command = ["hostpassd", "--bus-address", address, "--uri", uri, "--state-folder", f"{folder}/state"]
        command += ["--config", f"{folder}/none.toml", "--log-level", "warning"]
    daemon = await asyncio.create_subprocess_exec(
        sys.executable, "-B", "-m", *command, env=environment, start_new_session=True
    )
    showing = asyncio.create_task(show(arguments, daemon, address, uri))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({showing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if showing.done():
            return showing.result()
        print("\nEnded.")
        return 0
    finally:
        showing.cancel()
        stopping.cancel()
        if daemon.returncode is None:
            daemon.terminate()
            await daemon.wait()


@contextlib.contextmanager
def host(simulated: bool) -> Iterator[tuple[dict[str, str], str]]:
    """The environment in which the daemon sees the host, and its hypervisor."""
    if simulated:
        with MockHost() as mock:
            demo.furnish(mock)
            yield mock.environment(), demo.URI
        return
    there = any(os.path.exists(path) for path in LIBVIRT_SOCKETS)
    yield dict(os.environ), "qemu:///system" if there else EMBEDDED


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser("./dev run", description="The daemon on a private bus, and what it says.")
    parser.add_argument("--simulated", action="store_true", help="on a made-up host, with an assign and two dismisses")
    parser.add_argument("--once", action="store_true", help="end after showing it, instead of serving until Ctrl-C")
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="hostpassd-run-") as folder, PrivateBus() as bus:
            address = bus.address.partition(",")[0]  # without its guid it is shorter, and as good
            with host(arguments.simulated) as (environment, uri):
                return asyncio.run(serve(arguments, address, environment, uri, folder))
    except (BusDidNotStart, Failed) as error:
        print(f"run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads this, head for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
