"""The whole daemon under the shipped bus policy: a simulated host, libvirt's embedded driver, no polkit."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostpassd.model.text import TEXT_LIMIT
from tests.bus.busd import PATIENCE, Client, Heard, PrivateBus, Refused
from tests.bus.conftest import NewClient
from tests.bus.mockhost import MockHost

ROOT, MANAGER_PATH, MANAGER = "/org/hostpassd1", "/org/hostpassd1/manager", "org.hostpassd1.Manager"
DEVICES = ROOT + "/devices/"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
UNIT = Path(__file__).resolve().parents[2] / "systemd" / "hostpassd.service"

MACHINES = """<node xmlns:test='http://libvirt.org/schemas/domain/test/1.0'>
<domain type='test'><name>demo</name><uuid>11111111-2222-3333-4444-555555555555</uuid><memory>8192</memory>
<os><type>hvm</type></os><test:runstate>5</test:runstate></domain>
<domain type='test'><name>other</name><uuid>22222222-2222-3333-4444-555555555555</uuid><memory>8192</memory>
<os><type>hvm</type></os><test:runstate>5</test:runstate><devices>
<hostdev mode='subsystem' type='usb'><source><vendor id='0x1234'/><product id='0x5678'/></source></hostdev>
</devices></domain>
</node>
"""


class Daemon:
    """The daemon as a process, with what it writes."""

    def __init__(self, bus: PrivateBus, host: MockHost, folder: Path, *more: str) -> None:
        (folder / "machines.xml").write_text(MACHINES, encoding="utf-8")
        self.arguments = ["--bus-address", bus.address, "--uri", f"test://{folder}/machines.xml"]
        self.arguments += ["--state-folder", f"{folder}/state", "--config", f"{folder}/hostpassd.toml", *more]
        self._environment = host.environment()

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-B", "-m", "hostpassd", *self.arguments],
            env=self._environment,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    async def ended(self) -> tuple[int, str]:
        """The exit status and the words of a daemon that ends by itself."""
        _, words = await asyncio.wait_for(self.process.communicate(), PATIENCE)
        return self.process.returncode or 0, words.decode()

    async def stop(self) -> str:
        if self.process.returncode is None:
            self.process.terminate()
            self.words = (await self.ended())[1]
        return self.words


@pytest.fixture
def host() -> Iterator[MockHost]:
    with MockHost() as mock:
        mock.furnish()
        yield mock


async def wait_for_name(client: Client) -> None:
    driver = ("/org/freedesktop/DBus", "org.freedesktop.DBus")
    rule = "type='signal',member='NameOwnerChanged',arg0='org.hostpassd1'"
    await client.match(rule)
    if not (await client.call(*driver, "NameHasOwner", "s", "org.hostpassd1", destination="org.freedesktop.DBus"))[0]:
        await client.wait_for("NameOwnerChanged")


@pytest.fixture
async def daemon(bus: PrivateBus, host: MockHost, tmp_path: Path, client: Client) -> AsyncIterator[Daemon]:
    made = Daemon(bus, host, tmp_path)
    await made.start()
    await wait_for_name(client)
    yield made
    words = await made.stop()
    assert "Traceback" not in words, words


@pytest.fixture
async def root(new_client: NewClient) -> Client:
    return await new_client(0)


def plain(value: Any) -> Any:
    """A value without its variants."""
    if isinstance(value, dict) and set(value) == {"v"}:
        return plain(value["v"][1])
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


async def manager(client: Client, member: str, signature: str = "", *body: Any) -> Any:
    return plain(await client.call(MANAGER_PATH, MANAGER, member, signature, *body))


async def objects(client: Client) -> dict[str, Any]:
    """GetManagedObjects without what no signal tells."""
    found: dict[str, Any] = plain((await client.call(ROOT, OBJECT_MANAGER, "GetManagedObjects"))[0])
    del found[MANAGER_PATH][MANAGER]["Counters"]
    return found


async def device(client: Client, name: str, interface: str = "org.hostpassd1.Device") -> dict[str, Any]:
    return plain((await client.call(DEVICES + name, PROPERTIES, "GetAll", "s", interface))[0])  # type: ignore[no-any-return]


async def problems(client: Client) -> list[list[Any]]:
    return plain(await client.call(MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, "Problems"))[0]  # type: ignore[no-any-return]


def fold(tree: dict[str, Any], heard: list[Heard]) -> dict[str, Any]:
    """The signals folded onto an earlier GetManagedObjects."""
    tree = {path: {name: dict(values) for name, values in interfaces.items()} for path, interfaces in tree.items()}
    for signal in heard:
        body = plain(signal.body)
        if signal.member == "InterfacesAdded":
            tree.setdefault(body[0], {}).update(body[1])
        elif signal.member == "InterfacesRemoved":
            for name in body[1]:
                del tree[body[0]][name]
            if not tree[body[0]]:
                del tree[body[0]]
        elif signal.member == "PropertiesChanged":
            # The object manager itself is not among those that it manages.
            tree[signal.path][body[0]].update(body[1])
    return tree


def signals(client: Client) -> list[Heard]:
    return [heard for heard in client.heard if heard.kind == "signal" and heard.path.startswith(ROOT)]


async def test_the_tree_is_told_and_spelt(daemon: Daemon, client: Client) -> None:
    tree = await objects(client)
    nic = tree[DEVICES + "pci_0000_01_00_0"]
    assert nic["org.hostpassd1.Device"]["Driver"] == "e1000e"
    assert nic["org.hostpassd1.Device"]["Children"] == [DEVICES + "net_enp1s0"]
    assert nic["org.hostpassd1.Device.PCI"]["IommuGroup"] == 10
    for text, name in {
        "01:00.0": "pci_0000_01_00_0",
        "0000:01:00.0": "pci_0000_01_00_0",
        "8086:10d3": "pci_0000_01_00_0",
        "1-1.2": "usb_1_1_2",
        "enp1s0": "net_enp1s0",
        "52:54:00:00:00:10": "net_enp1s0",
        "serial:TWIN": "usb_1_1_3",
        "sda": "block_sda",
        "1-1.2:1.0": "usb_1_1_2__1_0",
        "/dev/bus/usb/001/004": "usb_1_1_3",
        "usb_1_2": "usb_1_2",
        nic["org.hostpassd1.Device"]["SysfsPath"]: "pci_0000_01_00_0",
        "/sys/bus/pci/devices/0000:01:00.0/": "pci_0000_01_00_0",
        "/sys/class/net/enp1s0": "net_enp1s0",
        DEVICES + "pci_0000_01_00_0": "pci_0000_01_00_0",
    }.items():
        assert (await manager(client, "FindDevices", "s", text))[0] == [DEVICES + name], text
    assert (await manager(client, "FindDevices", "s", "46f4:0001"))[0] == [DEVICES + "usb_1_1_2", DEVICES + "usb_1_1_3"]
    for text in ("no such thing", "TWIN", "serial:twin", "/sys/bus/pci/devices/../../../../tmp", "/sys/class/net/nope"):
        assert (await manager(client, "FindDevices", "s", text))[0] == [], text


@pytest.mark.parametrize("text", ["x" * 513, "/sys/" + "a/" * 30000, "/sys/class/" + "a/" * 30000])
async def test_a_text_longer_than_any_name_is_refused_by_everything_that_takes_one(
    daemon: Daemon, client: Client, text: str
) -> None:
    calls: list[tuple[str, str, list[Any]]] = [("FindDevices", "s", [text]), ("GetMachine", "s", [text])]
    for member in ("Assign", "Dismiss", "PlanAssign", "PlanDismiss"):
        calls += [(member, "sasa{sv}", ["demo", [text], {}]), (member, "sasa{sv}", [text, ["1-1.2"], {}])]
    for member, signature, body in calls:
        with pytest.raises(Refused) as refused:
            await manager(client, member, signature, *body)
        assert refused.value.name == "org.freedesktop.DBus.Error.InvalidArgs", member


async def test_the_daemon_keeps_no_capability(daemon: Daemon) -> None:
    tasks = Path(f"/proc/{daemon.process.pid}/task")
    for thread in tasks.iterdir():
        rows = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
        sets = ("CapInh", "CapPrm", "CapEff", "CapAmb", *(() if os.geteuid() else ("CapBnd",)))
        assert {name: int(rows[name], 16) for name in sets} == dict.fromkeys(sets, 0), rows["Name"]
    assert len(list(tasks.iterdir())) > 1  # libvirt's, at least


async def test_assign_and_dismiss_in_the_stored_configuration(daemon: Daemon, client: Client, root: Client) -> None:
    await client.match()
    options = {"config": {"v": ["b", True]}}
    [job] = await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.2"], options)
    assert job == ROOT + "/jobs/1"
    row = await device(client, "usb_1_1_2")
    [[machine, hold]] = row["Holders"]
    assert (hold["kind"], hold["live"], hold["config"], hold["stale"]) == ("hostdev", False, True, False)
    assert [b[1] for b in row["Blockers"]] == ["held-config"] and row["Assignable"] is False
    [added] = await client.wait_for("HoldAdded")
    assert plain(added.body) == [DEVICES + "usb_1_1_2", machine, hold]
    [completed] = await client.wait_for("Completed")
    assert (completed.path, completed.body) == (job, ["done", "", "", {}])
    with pytest.raises(Refused) as error:
        await manager(root, "Assign", "sasa{sv}", "demo", ["usb_1_1_2"], {})
    assert error.value.name == "org.hostpassd1.Error.AlreadyAssigned"
    with pytest.raises(Refused) as error:
        await manager(root, "Assign", "sasa{sv}", "other", ["usb_1_1_2"], {})
    assert error.value.name == "org.hostpassd1.Error.Blocked" and "held-config" in error.value.message
    await manager(root, "Dismiss", "sasa{sv}", machine, [DEVICES + "usb_1_1_2"], {})
    await client.wait_for("HoldRemoved")
    assert (await device(client, "usb_1_1_2"))["Holders"] == []


@pytest.mark.parametrize(
    ("member", "machine", "name", "options", "error"),
    [
        ("Assign", "nope", "1-1.2", {}, "NoSuchMachine"),
        ("Assign", "demo", "nope", {}, "NoSuchDevice"),
        ("Assign", "demo", "46f4:0001", {}, "AmbiguousDevice"),
        ("Assign", "demo", "1-1.2", {"colour": {"v": ["s", "red"]}}, "InvalidOption"),
        ("Assign", "demo", "1-1.2", {"live": {"v": ["s", "yes"]}}, "InvalidOption"),
        ("Assign", "demo", "1-1.2", {"live": {"v": ["b", True]}}, "InvalidOption"),
        ("Assign", "demo", "1-1.2", {"timeout": {"v": ["u", 0]}}, "InvalidOption"),
        ("Assign", "demo", "1-1.2", {"instance": {"v": ["t", 1]}}, "StalePlan"),
        ("Assign", "demo", "1-1.2", {"startup-policy": {"v": ["s", "never"]}}, "InvalidOption"),
        ("Assign", "demo", "1-1.2", {"boot-order": {"v": ["u", 0]}}, "InvalidOption"),
        ("Assign", "demo", "1-1.2", {"driver": {"v": ["s", "vfio-pci"]}}, "InvalidOption"),
        ("Assign", "demo", "01:00.0", {"rom-file": {"v": ["s", "/etc/hostname"]}}, "InvalidOption"),
        ("Assign", "demo", "1-1", {}, "Blocked"),
        ("Assign", "demo", "00:1f.2", {}, "Blocked"),
        ("Assign", "demo", "ttyS0", {}, "Blocked"),
        ("Assign", "demo", "/dev/ttyS0", {}, "Blocked"),
        ("Dismiss", "demo", "1-1.2", {}, "NotAssigned"),
        ("Dismiss", "demo", "1-1.2", {"rom-bar": {"v": ["b", True]}}, "InvalidOption"),
    ],
)
async def test_bad_input_gets_its_error_by_name_and_one_sentence(
    daemon: Daemon, root: Client, member: str, machine: str, name: str, options: dict[str, Any], error: str
) -> None:
    with pytest.raises(Refused) as refused:
        await manager(root, member, "sasa{sv}", machine, [name], options)
    assert refused.value.name == f"org.hostpassd1.Error.{error}"
    assert refused.value.message and "\n" not in refused.value.message


async def test_without_a_state_folder_it_serves_all_the_same_and_operations_are_refused_in_words(
    bus: PrivateBus, host: MockHost, tmp_path: Path, client: Client, root: Client
) -> None:
    (tmp_path / "state").write_text("no folder")
    daemon = Daemon(bus, host, tmp_path)
    await daemon.start()
    await wait_for_name(client)
    assert DEVICES + "usb_1_1_2" in await objects(client)
    with pytest.raises(Refused) as refused:
        await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.2"], {})
    assert refused.value.name == "org.hostpassd1.Error.Failed"
    assert f"{tmp_path}/state/intents cannot be read or written" in refused.value.message
    [[path, code, details, message]] = await problems(client)
    assert (path, code) == ("/", "state-folder") and details["error"] in message
    (tmp_path / "state").unlink()
    while not (await device(client, "usb_1_1_2"))["Holders"]:
        with contextlib.suppress(Refused):  # for a moment the last attempt to write stands for the next
            await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.2"], {})
    assert [row[1] for row in await problems(client)] == ["no-polkit"]
    words = await daemon.stop()
    assert "Traceback" not in words and "mistake" not in words, words


async def test_what_hangs_on_a_device_stands_for_it(daemon: Daemon, root: Client) -> None:
    for spelling in ("/dev/sda", "scsi_0_0_0_0", "usb_1_1_2__1_0"):
        await manager(root, "Assign", "sasa{sv}", "demo", [spelling], {})
        assert (await device(root, "usb_1_1_2"))["Holders"], spelling
        await manager(root, "Dismiss", "sasa{sv}", "demo", [spelling], {})


async def test_without_polkit_only_root_may(daemon: Daemon, client: Client) -> None:
    with pytest.raises(Refused) as refused:
        await manager(client, "Assign", "sasa{sv}", "demo", ["1-1.2"], {})
    assert refused.value.name == "org.hostpassd1.Error.NotAuthorized"
    assert (await device(client, "usb_1_1_2"))["Holders"] == []
    assert [row[:3] for row in await problems(client)] == [["/", "no-polkit", {}]]


async def test_plug_and_unplug_are_told_and_fold_to_the_truth(
    daemon: Daemon, client: Client, root: Client, host: MockHost
) -> None:
    first = await objects(client)
    await client.match()
    stick = host.plug_usb("1-3", product=0x0002, serial="NEW")
    await manager(client, "Sync")
    assert DEVICES + "usb_1_3" in await objects(client)
    await manager(root, "Assign", "sasa{sv}", "demo", ["1-3"], {})
    host.set_driver(host.path("0000:01:00.0"), "vfio-pci")
    host.unplug(stick)
    await manager(client, "Sync")
    missing = plain((await client.call(*_machine("Missing")))[0])
    assert [(row["live"], row["config"]) for row in missing] == [(False, True)]
    host.plug_usb("1-3", product=0x0002, serial="NEW")
    await manager(client, "Sync")
    assert (await device(client, "usb_1_3"))["Holders"]
    last = await objects(client)
    assert fold(first, signals(client)) == last
    await manager(client, "Rescan")
    assert await objects(client) == last
    told = [
        plain(s.body)[1].get("Generation")
        for s in signals(client)
        if s.path == MANAGER_PATH and s.member == "PropertiesChanged"
    ]
    generations = [number for number in told if number is not None]
    assert generations == sorted(set(generations))


async def test_counters_are_told_to_who_asks_and_by_no_signal(
    daemon: Daemon, client: Client, root: Client, host: MockHost
) -> None:
    async def counters() -> dict[str, int]:
        one = plain(await client.call(MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, "Counters"))[0]
        assert plain(await client.call(MANAGER_PATH, PROPERTIES, "GetAll", "s", MANAGER))[0]["Counters"] == one
        return {name: count for name, count in one.items() if count}

    async def in_the_snapshot() -> dict[str, int]:
        [found] = await client.call(ROOT, OBJECT_MANAGER, "GetManagedObjects")
        return {name: count for name, count in plain(found)[MANAGER_PATH][MANAGER]["Counters"].items() if count}

    await client.match()
    assert await counters() == {}
    stick = host.plug_usb("1-3", product=0x0002, serial="NEW")
    await manager(client, "Sync")
    host.unplug(stick)
    await manager(client, "Sync")
    await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.2"], {})
    told = {"plugs": 1, "unplugs": 1, "jobs-done": 1}
    assert await counters() == await in_the_snapshot() == told
    with pytest.raises(Refused):
        await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.2"], {})
    assert await in_the_snapshot() == told  # nothing changed but the count
    assert await counters() == told | {"refused": 1}
    assert not any("Counters" in plain(s.body)[1] for s in signals(client) if s.member == "PropertiesChanged")


async def test_gdbus_own_client_of_object_managers_has_what_is_told(
    daemon: Daemon, bus: PrivateBus, client: Client, root: Client, host: MockHost
) -> None:
    program = [sys.executable, "-B", str(Path(__file__).with_name("gdbus.py")), bus.address]
    gdbus = await asyncio.create_subprocess_exec(
        *program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24
    )
    ask, told = gdbus.stdin, gdbus.stdout
    assert ask and told

    async def known() -> dict[str, Any]:
        tree: dict[str, Any] = json.loads(await asyncio.wait_for(told.readline(), PATIENCE))
        del tree[MANAGER_PATH][MANAGER]["Counters"]
        return tree

    first = await known()
    assert first == await objects(client)
    host.plug_usb("1-9", product=7, serial="NEW")
    host.unplug(host.path("1-1.3"))
    await manager(client, "Sync")
    await manager(root, "Assign", "sasa{sv}", "demo", ["1-9", "1-1.2"], {})
    host.unplug(host.path("1-9"))
    await manager(client, "Sync")
    ask.write(b"\n")
    assert (last := await known()) == await objects(client) != first
    assert DEVICES + "usb_1_9" not in last and len(last[ROOT + "/jobs/1"]["org.hostpassd1.Job"]["Devices"]) == 2
    ask.close()
    assert await asyncio.wait_for(gdbus.wait(), PATIENCE) == 0


def _machine(name: str) -> tuple[str, str, str, str, str, str]:
    return (
        ROOT + "/machines/11111111_2222_3333_4444_555555555555",
        PROPERTIES,
        "Get",
        "ss",
        "org.hostpassd1.Machine",
        name,
    )


async def test_a_replug_is_a_new_instance_and_the_missing_is_dismissed_by_where_it_was(
    daemon: Daemon, client: Client, root: Client, host: MockHost
) -> None:
    before = (await device(client, "usb_1_1_3"))["Instance"]
    host.unplug(host.path("1-1.2"))
    await manager(client, "Sync")
    await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.3"], {})
    await client.match()
    host.unplug(host.path("1-1.3"))
    await manager(client, "Sync")
    [missing] = await client.wait_for("HoldMissing")
    assert plain(missing.body[2]) == plain((await client.call(*_machine("Missing")))[0])[0]
    assert missing.body[0] == DEVICES + "usb_1_1_3" and "HoldRemoved" not in [s.member for s in signals(client)]
    await manager(root, "Dismiss", "sasa{sv}", "demo", ["usb_1_1_3"], {})
    assert plain((await client.call(*_machine("Missing")))[0]) == []
    [removed] = await client.wait_for("HoldRemoved")
    assert removed.body[:2] == missing.body[:2]
    host.plug_usb("1-1.3")
    await manager(client, "Sync")
    assert (await device(client, "usb_1_1_3"))["Instance"] > before


async def test_hostile_strings_are_shown_clean_and_harm_nothing(daemon: Daemon, client: Client, host: MockHost) -> None:
    host.plug_usb(
        "1-4", serial=b"\x1b[31mA\x00\xff\xfeB" + b"C" * 4096, manufacturer=b"\xc3", name="\u202eevil\n\tname"
    )
    await manager(client, "Sync")
    row = await device(client, "usb_1_4")
    for key in ("Serial", "Vendor", "Product", "Label"):
        assert len(row[key]) <= TEXT_LIMIT and row[key].isprintable(), key
    assert row["Product"] == "evil name"


async def test_a_file_that_cannot_be_read_leaves_that_property_empty(
    daemon: Daemon, client: Client, host: MockHost
) -> None:
    path = host.plug_usb("1-4", serial="S")
    os.remove(host.root / path.lstrip("/") / "serial")
    os.mkdir(host.root / path.lstrip("/") / "serial")
    host.change(path)
    await manager(client, "Sync")
    assert (await device(client, "usb_1_4"))["Serial"] == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hypervisors = [\n", "line"),
        ("\ntimeout = 'long'\n", "line 2: timeout is"),
        ("\n\ncolour = 'red'\n", "line 3: colour is not a setting"),
        ('excluded-classes = ["7"]\n', "line 1: excluded-classes"),
        ('never = ["0000:01:00.0"]\n', "line 1: never"),
        ("hypervisors = []\n", "line 1: hypervisors"),
        ('rom-folders = ["roms"]\n', "line 1: rom-folders"),
    ],
)
async def test_a_broken_configuration_stops_the_start_and_names_the_line(
    bus: PrivateBus, host: MockHost, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "hostpassd.toml").write_text(text, encoding="utf-8")
    daemon = Daemon(bus, host, tmp_path)
    await daemon.start()
    status, said = await daemon.ended()
    assert status == 78 and words in said and "Traceback" not in said


async def test_the_configuration_is_used(bus: PrivateBus, host: MockHost, tmp_path: Path, client: Client) -> None:
    (tmp_path / "card.rom").touch()
    text = f'excluded-classes = ["02"]\nnever = ["usb_1_1_2"]\nrom-folders = ["{tmp_path}"]\n'
    (tmp_path / "hostpassd.toml").write_text(text, encoding="utf-8")
    daemon = Daemon(bus, host, tmp_path)
    await daemon.start()
    await wait_for_name(client)
    assert [b[1] for b in (await device(client, "pci_0000_01_00_0"))["Blockers"]] == ["class-excluded"]
    assert [b[1] for b in (await device(client, "usb_1_1_2"))["Blockers"]] == ["host-system"]
    rom = {"rom-file": {"v": ["s", f"{tmp_path}/card.rom"]}}
    [plan] = await manager(client, "PlanAssign", "sasa{sv}", "demo", ["01:00.0"], rom)
    assert not plan["possible"]
    await daemon.stop()


async def test_whoever_does_not_read_its_log_does_not_stop_the_daemon(
    bus: PrivateBus, host: MockHost, tmp_path: Path, client: Client
) -> None:
    """Every refusal is a debug line; a pipe takes some hundred, and this test's loop reads some hundred more."""
    daemon = Daemon(bus, host, tmp_path, "--log-level", "debug")
    await daemon.start()
    await wait_for_name(client)
    for _ in range(300):
        calls = [
            client.begin(MANAGER_PATH, MANAGER, "Assign", "sasa{sv}", "demo", ["nope" * 100], {}) for _ in range(16)
        ]
        answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE)
        assert {getattr(answer, "name", answer) for answer in answers} == {"org.hostpassd1.Error.NoSuchDevice"}
    assert "lines are lost" in await daemon.stop()


async def test_a_second_daemon_says_so_and_the_first_goes_on(
    daemon: Daemon, bus: PrivateBus, host: MockHost, tmp_path: Path, client: Client
) -> None:
    second = Daemon(bus, host, tmp_path)
    await second.start()
    status, said = await second.ended()
    assert status == 1 and "taken" in said
    await manager(client, "Sync")


async def test_a_bus_that_goes_ends_the_daemon(bus: PrivateBus, host: MockHost, tmp_path: Path, client: Client) -> None:
    daemon = Daemon(bus, host, tmp_path)
    await daemon.start()
    await wait_for_name(client)
    bus.stop()
    status, said = await daemon.ended()
    assert status == 1 and "message bus is gone" in said and "Traceback" not in said


async def test_calls_under_way_at_the_end_are_no_fault(daemon: Daemon, client: Client, new_client: NewClient) -> None:
    """They are answered, or not; the daemon's own words have no traceback, which `daemon` looks for."""
    callers = [client, *[await new_client(1) for _ in range(3)]]
    calls = [one.begin(MANAGER_PATH, MANAGER, "Assign", "sasa{sv}", "demo", ["1-1.2"], {}) for one in callers * 100]
    await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    await daemon.stop()
    for call in calls:
        call.cancel()


async def test_a_storm_loses_nothing(daemon: Daemon, client: Client, host: MockHost) -> None:
    first = await objects(client)
    await client.match()
    for _ in range(3):
        for port in range(5, 30):
            host.plug_usb(f"1-{port}", serial=f"S{port}")
        for port in range(5, 30):
            host.unplug(host.path(f"1-{port}"))
    await manager(client, "Sync")
    assert fold(first, signals(client)) == await objects(client)
    assert set(first) == set(await objects(client))


def peak_of(process: asyncio.subprocess.Process) -> int:
    """The most bytes that it ever had resident."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(peak) * 1024


async def test_the_longest_messages_that_the_bus_takes_fit_into_what_the_unit_allows(
    daemon: Daemon, client: Client, new_client: NewClient
) -> None:
    [allowed] = re.findall(r"MemoryMax=(\d+)M", UNIT.read_text(encoding="utf-8"))
    clients = [client, *[await new_client(1) for _ in range(4)]]
    long = "x" * (31 << 20)
    calls = [one.begin(MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, long) for one in clients]
    clients[0].begin("/" + long, MANAGER, "Rescan", no_reply=True)
    refused = [error for error in await asyncio.gather(*calls, return_exceptions=True) if isinstance(error, Refused)]
    assert len(refused) == len(calls) and all(len(error.message) < 200 for error in refused)
    names = {error.name for error in refused}
    # dbus-broker refuses a message itself when the daemon has not yet read too many of its sender's.
    assert "org.hostpassd1.Error.LimitExceeded" in names
    assert names <= {"org.hostpassd1.Error.LimitExceeded", "org.freedesktop.DBus.Error.LimitsExceeded"}
    await manager(client, "Sync")
    assert peak_of(daemon.process) < int(allowed) << 20


async def test_a_plan_is_told_and_is_what_assign_executes(
    daemon: Daemon, client: Client, root: Client, host: MockHost
) -> None:
    [plan] = await manager(client, "PlanAssign", "sasa{sv}", "demo", ["1-1.2"], {})
    assert plan["possible"] and plan["devices"] == [DEVICES + "usb_1_1_2"] and plan["blockers"] == []
    assert plan["loses"] == [DEVICES + "block_sda"] and plan["authorization"] == "no" and len(plan["steps"]) == 1
    assert (await manager(root, "PlanAssign", "sasa{sv}", "demo", ["1-1.2"], {}))[0]["authorization"] == "yes"
    host.plug_usb("1-9", product=7)
    await manager(client, "Sync")
    token = {"plan": {"v": ["s", plan["token"]]}}
    await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.2"], token)
    with pytest.raises(Refused) as refused:
        await manager(root, "Assign", "sasa{sv}", "demo", ["1-1.2"], token)
    assert refused.value.name == "org.hostpassd1.Error.StalePlan"
    [plan] = await manager(root, "PlanDismiss", "sasa{sv}", "demo", ["1-1.2"], {})
    host.unplug(host.path("1-1.2"))
    await manager(client, "Sync")
    with pytest.raises(Refused) as refused:
        await manager(root, "Dismiss", "sasa{sv}", "demo", ["1-1.2"], {"plan": {"v": ["s", plan["token"]]}})
    assert refused.value.name == "org.hostpassd1.Error.StalePlan"


async def test_several_devices_are_one_operation_and_what_could_be_given_is_one_call(
    daemon: Daemon, client: Client, root: Client
) -> None:
    sticks = [DEVICES + "usb_1_1_2", DEVICES + "usb_1_1_3"]
    [listed] = await manager(client, "ListCandidates", "sa{sv}", "demo", {})
    rows = {tuple(devices): (possible, more) for devices, possible, _, more in plain(listed)}
    assert [rows[stick,][0] for stick in sticks] == [True, True] and not any(
        DEVICES + "usb_usb1" in row for row in rows
    )
    assert rows[sticks[0],][1] == {"loses": [DEVICES + "block_sda"], "authorization": "no"}
    [plan] = await manager(root, "PlanAssign", "sasa{sv}", "demo", ["1-1.3", "1-1.2"], {})
    assert plan["devices"] == sticks and [step[:2] for step in plan["steps"]] == [[stick, "store"] for stick in sticks]
    [job] = await manager(
        root, "Assign", "sasa{sv}", "demo", ["1-1.3", "/dev/sda"], {"plan": {"v": ["s", plan["token"]]}}
    )
    told = plain((await client.call(job, PROPERTIES, "GetAll", "s", "org.hostpassd1.Job"))[0])
    assert (told["Devices"], told["StepNumber"], told["StepCount"]) == (sticks, 2, 2)
    assert (told["Step"], told["Error"], told["Deadline"]) == (["/", "", {}, ""], ["", {}, ""], 0)
    [listed] = await manager(client, "ListCandidates", "sa{sv}", "demo", {})
    assert not any(stick in row[0] for row in listed for stick in sticks)
    with pytest.raises(Refused) as refused:
        await manager(root, "Assign", "sasa{sv}", "demo", [], {})
    assert refused.value.name == "org.freedesktop.DBus.Error.InvalidArgs"
    await manager(root, "Dismiss", "sasa{sv}", "demo", sticks, {})
    assert [(await device(client, stick.rpartition("/")[2]))["Holders"] for stick in sticks] == [[], []]


async def test_many_plans_at_once_are_all_answered(daemon: Daemon, root: Client) -> None:
    plans = [root.begin(MANAGER_PATH, MANAGER, "PlanAssign", "sasa{sv}", "demo", ["1-1.2"], {}) for _ in range(300)]
    answers = await asyncio.gather(*plans, return_exceptions=True)
    refused = [answer.name for answer in answers if isinstance(answer, Refused)]
    # dbus-daemon itself refuses what would have one connection wait for more than 128 answers.
    assert set(refused) <= {"org.freedesktop.DBus.Error.LimitsExceeded"} and len(answers) - len(refused) >= 128
    assert len({plain(answer)[0]["token"] for answer in answers if not isinstance(answer, Refused)}) == 1


async def test_what_blocks_is_overridden_by_name(daemon: Daemon, root: Client) -> None:
    [plan] = await manager(root, "PlanAssign", "sasa{sv}", "demo", ["00:02.0"], {})
    assert [row[1] for row in plan["blockers"]] == ["boot-display"] and not plan["possible"]
    override = {"override": {"v": ["as", ["boot-display"]]}}
    assert (await manager(root, "PlanAssign", "sasa{sv}", "demo", ["00:02.0"], override))[0]["possible"]
    await manager(root, "Assign", "sasa{sv}", "demo", ["00:02.0"], override)
    await manager(root, "Dismiss", "sasa{sv}", "demo", ["00:02.0"], {})
    for code, error in (("host-system", "Blocked"), ("held-live", "Blocked"), ("nonsense", "InvalidOption")):
        with pytest.raises(Refused) as refused:
            await manager(root, "Assign", "sasa{sv}", "demo", ["00:02.0"], {"override": {"v": ["as", [code]]}})
        assert refused.value.name == "org.hostpassd1.Error." + error
