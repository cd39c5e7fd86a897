"""What the host itself uses its devices for: file systems, swap, storage stacks, network -> host uses.

The upper part is pure, given the texts and a sysfs tree; the lower part reads them and watches for changes.
Device nodes are never touched: under the shipped unit there are none. Numbers and sysfs say all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import ipaddress
import logging
import os
import re
import select
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from hostpassd.events import Event, HostUse, HostUsesRead
from hostpassd.faults import vital
from hostpassd.host import rtnetlink
from hostpassd.host.device import clean
from hostpassd.host.reading import Files, Hung, Reader
from hostpassd.host.rtnetlink import Link, Network
from hostpassd.host.sysfs import VIRTUAL
from hostpassd.shared import Shared

log = logging.getLogger(__name__)

# What the host cannot live without, with all that is mounted below it. /efi is where some mount what others have at
# /boot/efi.
_SYSTEM_FOLDERS = ("/boot", "/efi", "/usr", "/var")

# But not what is mounted below these: users make folders there (/var/home is /home where / is read-only), and have
# things mounted on them.
_USERS_FOLDERS = ("/var/home", "/var/tmp")

# File systems over several devices: they have no device's number, and the kernel tells one of the devices, or all with
# colons, as their source. The source of any other is whatever the one who mounts says, and users may mount FUSE.
_NAME_THEIR_DEVICES = frozenset({"btrfs", "bcachefs"})

_MASTERS = {"bridge": "bridge", "openvswitch": "bridge", "bond": "bond", "team": "bond"}
# macvtap is left out: it is a machine's, and shows as its hold.
_UPPERS = {"vlan": "vlan", "macvlan": "macvlan", "ipvlan": "macvlan"}

# Whose lower link is what they stand on; a veth's is its other end.
_ON_ANOTHER = frozenset({*_UPPERS, "macvtap"})

_DEPTH = 16  # storage stacks are no deeper than this; a loop in them ends here

# By the start of dm/uuid.
_MAPPINGS = (("LVM-", "LVM volume"), ("CRYPT-", "LUKS"), ("mpath-", "multipath"))

# The uses of each place in sysfs; the places behind the nodes of partitions and stacks, and behind virtual interfaces.
Uses = dict[str, tuple[HostUse, ...]]
Nodes = dict[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True, slots=True)
class BlockNode:
    """What udev knows of a block device, in the tree or not."""

    nodes: tuple[str, ...]  # its own and the links to it: /dev/dm-0, /dev/mapper/vg-data, /dev/vg/data
    pool: str = ""  # the ZFS pool that it is a member of


class Sysfs:
    """The links and small files that storage is resolved by; ROOT is another folder in tests."""

    def __init__(self, root: str = "/sys", files: Files | None = None) -> None:
        self._root = root
        self._files = files or Files()

    def real(self, path: str) -> str | None:
        """Where PATH (below /sys, without it) leads, as /sys/devices/...; None: nowhere."""
        place = os.path.realpath(f"{self._root}/{path}")
        if not os.path.exists(place):
            return None
        return "/sys" + place.removeprefix(os.path.realpath(self._root))

    def names(self, path: str) -> list[str]:
        """What is in the folder PATH (/sys/...), sorted; empty if there is none."""
        try:
            return sorted(os.listdir(self._root + path.removeprefix("/sys")))
        except OSError:
            return []

    def has(self, path: str) -> bool:
        """Whether there is PATH (/sys/...)."""
        return os.path.exists(self._root + path.removeprefix("/sys"))

    def text(self, path: str) -> str:
        """The text of the file PATH (/sys/...); '' if there is none."""
        try:
            return os.fsdecode(self._files.read(self._root + path.removeprefix("/sys"), (0, 4096))[0]).strip()
        except OSError:
            return ""


@dataclasses.dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    number: str  # major:minor; major 0 for a file system that is not one block device
    root: str  # what of the file system is mounted
    point: str
    type: str
    source: str

    @property
    def system(self) -> bool:
        """Whether the host cannot live without it."""
        if any(self.point != folder and _within(self.point, folder) for folder in _USERS_FOLDERS):
            return False
        return self.point == "/" or any(_within(self.point, folder) for folder in _SYSTEM_FOLDERS)


@dataclasses.dataclass(frozen=True, slots=True)
class Base:
    """A physical device that something rests on, and what lies between: topmost first, disk or partition last."""

    path: str
    chain: tuple[str, ...]

    def __str__(self) -> str:
        return " on ".join(self.chain)


def parse_mounts(text: str) -> list[Mount]:
    """The lines of /proc/self/mountinfo."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, tail = left.split(" "), right.split(" ")
        if len(fields) >= 6 and len(tail) >= 2:
            kind, source = tail[0], unescape(tail[1])
            mounts.append(Mount(fields[2], unescape(fields[3]), unescape(fields[4]), kind, source))
    return mounts


def parse_swaps(text: str) -> list[tuple[str, bool]]:
    """The lines of /proc/swaps: (path, whether it is a file)."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return [(unescape(row[0]), row[1] == "file") for row in rows if len(row) >= 2]


def unescape(text: str) -> str:
    """TEXT with the kernel's octal escapes (a space is \\040) undone."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def own_mounts(mounts: Iterable[Mount]) -> list[Mount]:
    """MOUNTS without those that only show again what another one shows.

    The unit's sandbox makes such (/tmp, /usr and its own folders, out of the root file system), containers do too;
    Btrfs subvolumes are not such. What makes a file system one of the system's is never dropped for another that
    does not.
    """
    by_number: dict[str, list[Mount]] = {}
    for mount in mounts:
        known = by_number.setdefault(mount.number, [])
        if all((mount.root, mount.point) != (other.root, other.point) for other in known):
            known.append(mount)
    return [mount for group in by_number.values() for mount in group if not _repeats(mount, group)]


def _repeats(mount: Mount, group: list[Mount]) -> bool:
    return any(
        other.root != mount.root and _within(mount.root, other.root) and (other.system or not mount.system)
        for other in group
    )


def _within(path: str, folder: str) -> bool:
    return folder == "/" or path == folder or path.startswith(folder + "/")


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """The mount that PATH is on: the longest, and of equals the last, which hides the others."""
    best: Mount | None = None
    for mount in mounts:
        if _within(path, mount.point) and (best is None or len(mount.point) >= len(best.point)):
            best = mount
    return best


class Storage:
    """What rests on which physical devices, through partitions and stacks."""

    def __init__(
        self,
        sysfs: Sysfs,
        mounts: list[Mount],
        swaps: Iterable[tuple[str, bool]],
        state_folder: str,
        blocks: Mapping[str, BlockNode],
        pools: Collection[str],
    ) -> None:
        """BLOCKS by sysfs path; POOLS: the ZFS pools that are imported."""
        self._sysfs = sysfs
        self._mounts = mounts
        self._swaps = swaps
        self._state_folder = state_folder
        self._blocks = blocks
        self._members: dict[str, list[str]] = {pool: [] for pool in pools}
        for path, block in blocks.items():
            if block.pool in self._members:
                self._members[block.pool].append(path)
        self._found: dict[str, dict[HostUse, None]] = {}

    def uses(self) -> Uses:
        """All uses by physical device."""
        for mount in own_mounts(self._mounts):
            self._note("mount", mount.point, self._under_mount(mount), mount.system)
        self._note_state_folder()
        for path, is_file in self._swaps:
            bases = self._under_file(path) if is_file else self._under(self._named(path))
            self._note("swap", f"swap file {path}" if is_file else "swap", bases, True)
        self._note_stacks()
        return {path: tuple(uses) for path, uses in self._found.items()}

    def nodes(self) -> Nodes:
        """The device nodes of partitions and of what is virtual, each with the physical devices behind it, if any."""
        found: Nodes = {}
        for path, block in self._blocks.items():
            disk = path.rpartition("/")[0]
            if path.startswith(VIRTUAL):
                found.update(dict.fromkeys(block.nodes, tuple(dict.fromkeys(b.path for b in self._under(path)))))
            elif disk in self._blocks:  # a partition, told without a look at sysfs: there can be thousands
                found.update(dict.fromkeys(block.nodes, (disk,)))
        return found

    def _note(self, kind: str, what: str, bases: Iterable[Base], system: bool) -> None:
        for base in bases:
            detail = clean(f"{what} on {base}" if what else str(base))
            self._found.setdefault(base.path, {})[HostUse(kind, detail, system)] = None

    def _note_state_folder(self) -> None:
        mount = mount_of(self._state_folder, self._mounts) if self._state_folder else None
        if mount is not None and not mount.system:
            self._note("mount", self._state_folder, self._under_mount(mount), True)

    def _note_stacks(self) -> None:
        folder = f"{VIRTUAL}block"
        for name in self._sysfs.names(folder):
            if self._sysfs.names(f"{folder}/{name}/slaves"):
                self._note("storage-stack", "", self._under(f"{folder}/{name}"), False)
        for pool, members in self._members.items():
            for member in members:
                self._note("storage-stack", f"ZFS pool {pool}", self._under(member), False)

    def _under_mount(self, mount: Mount, depth: int = 0) -> list[Base]:
        if not mount.number.startswith("0:"):
            return self._under(self._sysfs.real(f"dev/block/{mount.number}"), depth)
        if mount.type == "zfs":
            return self._under_pool(mount.source.partition("/")[0], depth)
        if mount.type not in _NAME_THEIR_DEVICES:
            return []
        devices = [place for source in re.split(":(?=/)", mount.source) if (place := self._named(source))]
        if mount.type == "btrfs":
            devices = self._btrfs(devices)
        return [base for device in devices for base in self._under(device, depth)]

    def _under_pool(self, pool: str, depth: int) -> list[Base]:
        bases = [base for member in self._members.get(pool, ()) for base in self._under(member, depth + 1)]
        return [Base(base.path, (f"ZFS pool {pool}", *base.chain)) for base in bases]

    def _btrfs(self, devices: list[str]) -> list[str]:
        """All devices of the file system that DEVICES belong to."""
        for identity in self._sysfs.names("/sys/fs/btrfs"):
            names = self._sysfs.names(f"/sys/fs/btrfs/{identity}/devices")
            members = [place for name in names if (place := self._sysfs.real(f"class/block/{name}"))]
            if set(members) & set(devices):
                return members
        return devices

    def _under_file(self, path: str, depth: int = 0) -> list[Base]:
        mount = mount_of(path, self._mounts)
        return self._under_mount(mount, depth) if mount else []

    def _named(self, path: str) -> str | None:
        """The block device that PATH (/dev/sda2, /dev/mapper/vg-root) is the node of, without touching the node."""
        if not path.startswith("/dev/"):
            return None  # anyone may call a tmpfs sda2
        name = path.removeprefix("/dev/")
        if name.startswith("mapper/"):
            return self._mapped(name.removeprefix("mapper/"))
        return self._sysfs.real(f"class/block/{name.replace('/', '!')}")

    def _mapped(self, name: str) -> str | None:
        folder = f"{VIRTUAL}block"
        devices = (f"{folder}/{entry}" for entry in self._sysfs.names(folder) if entry.startswith("dm-"))
        return next((device for device in devices if self._sysfs.text(f"{device}/dm/name") == name), None)

    def _under(self, device: str | None, depth: int = 0) -> list[Base]:
        """The physical devices below the block device at DEVICE."""
        if device is None or depth > _DEPTH:
            return []
        word = self._word(device)
        if self._sysfs.text(f"{device}/partition"):
            # The partition's name says which disk it is on.
            whole = self._under(device.rpartition("/")[0], depth + 1)
            return [Base(base.path, (word, *base.chain[1:])) for base in whole]
        if not device.startswith(VIRTUAL):
            return [Base(device, (word,))]
        if device.startswith(f"{VIRTUAL}nvme-subsystem/"):
            return [Base(controller, (word,)) for controller in self._controllers(device.rpartition("/")[0])]
        return [Base(base.path, (word, *base.chain)) for base in self._lower(device, depth + 1)]

    def _lower(self, device: str, depth: int) -> list[Base]:
        """What the virtual block device at DEVICE stands on."""
        slaves = self._sysfs.names(f"{device}/slaves")
        places = (self._sysfs.real(f"{device.removeprefix('/sys/')}/slaves/{slave}") for slave in slaves)
        bases = [base for place in places for base in self._under(place, depth)]
        backing = self._sysfs.text(f"{device}/loop/backing_file")
        bases += self._under_file(backing, depth) if backing else []
        # A volume of a pool has no slaves; its link says whose it is: /dev/zvol/tank/volume.
        links = (node.split("/") for node in self._blocks.get(device, BlockNode(())).nodes)
        pool = next((words[3] for words in links if words[:3] == ["", "dev", "zvol"] and len(words) > 4), "")
        return bases + (self._under_pool(pool, depth) if pool else [])

    def _controllers(self, subsystem: str) -> list[str]:
        """NVMe multipath: the controllers through which a subsystem is reached."""
        names = [name for name in self._sysfs.names(subsystem) if re.fullmatch("nvme[0-9]+", name)]
        places = (self._sysfs.real(f"{subsystem.removeprefix('/sys/')}/{name}") for name in names)
        return [place for place in places if place]

    def _word(self, device: str) -> str:
        """What people call the block device at DEVICE."""
        name = device.rpartition("/")[2]
        mapping = self._sysfs.text(f"{device}/dm/name")
        if mapping:
            identity = self._sysfs.text(f"{device}/dm/uuid")
            word = next((word for start, word in _MAPPINGS if identity.startswith(start)), "device mapper")
            return f"{word} {mapping}"
        if name.startswith("md") and self._sysfs.names(f"{device}/md"):
            return f"RAID {name}"
        backing = self._sysfs.text(f"{device}/loop/backing_file")
        return f"loop file {backing}" if backing else "/dev/" + name.replace("!", "/")


# Network.


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


def random_generator(sysfs: Sysfs) -> Nodes:
    """What is behind /dev/hwrng. The kernel tells the name that a driver gave, which only for some says the device."""
    folder = "/sys/class/misc/hw_random"
    if not sysfs.names(folder):
        return {}
    current = sysfs.text(f"{folder}/rng_current")
    place = None
    if current.startswith("virtio_rng."):
        devices = [name for name in sysfs.names("/sys/bus/virtio/drivers/virtio_rng") if name.startswith("virtio")]
        place = sysfs.real(f"bus/virtio/devices/{devices[0]}") if len(devices) == 1 else None
    elif current.startswith("tpm-rng-"):
        place = sysfs.real(f"class/tpm/tpm{current.removeprefix('tpm-rng-')}")
    return {"/dev/hwrng": (place,) if place else ()}


# Reading and watching.


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What the host does with its devices. `uses`: of physical devices, by sysfs path."""

    uses: Uses
    nodes: Nodes
    whole: bool = True  # False: the network changed all the while; something may be in here that was


def read_uses(state_folder: str, blocks: Mapping[str, BlockNode], nics: Collection[str], files: Files) -> Reading:
    """All uses, and what leads to the devices. Blocking, some ms. Raises OSError."""
    sysfs = Sysfs(files=files)
    mounts = parse_mounts(_read(files, "/proc/self/mountinfo"))
    swaps = parse_swaps(_read(files, "/proc/swaps"))
    storage = Storage(sysfs, mounts, swaps, state_folder, blocks, _imported_pools())
    network = rtnetlink.read()
    found = storage.uses() | elsewhere(sysfs, nics)
    for name, uses in network_uses(network).items():
        place = sysfs.real(f"class/net/{name}")
        if uses and place and not place.startswith(VIRTUAL):
            found[place] = uses
    nodes = storage.nodes() | random_generator(sysfs)
    for link in network.links:
        if (place := sysfs.real(f"class/net/{link.name}")) and place.startswith(VIRTUAL):
            below = (sysfs.real(f"class/net/{name}") for name in lowest(link, network))
            nodes[link.name] = tuple(path for path in below if path and not path.startswith(VIRTUAL))
    return Reading(found, nodes, network.whole)


def _imported_pools() -> list[str]:
    try:
        return [entry.name for entry in os.scandir("/proc/spl/kstat/zfs") if entry.is_dir()]
    except OSError:
        return []  # no ZFS here


def _read(files: Files, path: str) -> str:
    files.begin(path)
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read())
    except FileNotFoundError:
        return ""  # a kernel without swap has no /proc/swaps
    finally:
        files.end()


class HostUses:
    """Reads the host's uses when they change, and emits each reading.

    NODE_OF names the nearest device of the tree at or above a sysfs path. BLOCKS: all block devices, by sysfs path.
    NICS: the devices that network interfaces are or were of. STATE_FOLDER: where the daemon keeps its own state, which
    it cannot live without.
    """

    _DELAY = 0.05  # seconds that changes are gathered for
    _AGAIN = 2.0  # seconds after a reading that is not whole

    def __init__(
        self,
        emit: Callable[[Event], None],
        node_of: Callable[[str], str | None],
        blocks: Mapping[str, BlockNode],
        nics: Collection[str],
        state_folder: str,
        reader: Reader | None = None,
    ) -> None:
        self._emit = emit
        self._node_of = node_of
        self._blocks = blocks
        self._nics = nics
        self._reader = reader or Reader()
        self._state_folder = state_folder
        self._shared = Shared(self._read_now)
        self._timer: asyncio.TimerHandle | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._files: list[int] = []
        self._epoll: select.epoll | None = None
        self._routes: socket.socket | None = None

    def start(self) -> None:
        """Watch mounts, swap and the network: each change leads to a reading. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._epoll = self._watch_files()
        loop.add_reader(self._epoll.fileno(), self._files_changed)
        self._routes = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._routes.bind((0, rtnetlink.GROUPS))
        loop.add_reader(self._routes.fileno(), self._network_changed)

    def refresh(self) -> None:
        """Something may have changed: read soon, once for all that changes until then."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._DELAY, self._due)

    async def read_now(self) -> HostUsesRead:
        """A reading that begins after the call; emitted, too. Raises OSError; the last reading then stands."""
        return await self._shared()

    def close(self) -> None:
        """Watch no more."""
        loop = asyncio.get_running_loop()
        for watched in (self._epoll, self._routes):
            if watched is not None:
                loop.remove_reader(watched.fileno())
                watched.close()
        for file in self._files:
            os.close(file)
        if self._timer is not None:
            self._timer.cancel()
        self._epoll = self._routes = self._timer = None
        self._files.clear()

    def _watch_files(self) -> select.epoll:
        """These files are always readable, and have an exceptional condition when they changed: an epoll inside the
        loop's own is how to wait for that alone."""
        epoll = select.epoll()
        for path in filter(os.path.exists, ("/proc/self/mountinfo", "/proc/swaps")):
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files.append(file)
            epoll.register(file, select.EPOLLPRI | select.EPOLLERR)
        return epoll

    def _files_changed(self) -> None:
        if self._epoll is not None:
            self._epoll.poll(0)
            self.refresh()

    def _network_changed(self) -> None:
        """The messages only wake: what they say is read afresh. An overflow is no loss, then."""
        try:
            while self._routes is not None:
                self._routes.recv(65536)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log.debug("rtnetlink: %s", error)
        self.refresh()

    def _due(self) -> None:
        self._timer = None
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())
            self._refreshing.add_done_callback(vital)
        else:
            self.refresh()  # a reading may have begun before the change; look again

    async def _refresh(self) -> None:
        try:
            await self.read_now()
        except OSError as error:
            log.error("what the host uses its devices for cannot be read, the last reading stands: %s", error)

    async def _read_now(self) -> HostUsesRead:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        reading = await self._read()
        event = HostUsesRead(self._by_name(reading.uses), self._with_names(reading.nodes))
        self._emit(event)
        if not reading.whole and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._AGAIN, self._due)
        return event

    async def _read(self) -> Reading:
        while True:
            # Copies: the loop goes on writing meanwhile.
            blocks, nics = dict(self._blocks), frozenset(self._nics)
            with contextlib.suppress(Hung):  # then once more, without the file that it hung at
                return await self._reader.run(functools.partial(read_uses, self._state_folder, blocks, nics))

    def _with_names(self, nodes: Nodes) -> dict[str, tuple[str, ...]]:
        named = {node: filter(None, map(self._node_of, places)) for node, places in nodes.items()}
        return {node: tuple(dict.fromkeys(names)) for node, names in named.items()}

    def _by_name(self, found: Uses) -> Uses:
        named: Uses = {}
        for path, uses in found.items():
            name = self._node_of(path)
            if name is not None:
                named[name] = named.get(name, ()) + uses
        return named
