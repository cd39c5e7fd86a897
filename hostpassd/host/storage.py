"""What rests on which physical disks: mounts and swap, through partitions, stacks, loops and pools. Pure but for sysfs.

Device nodes are never touched: under the shipped unit there are none. Numbers and sysfs say all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping

from hostpassd.host.reading import Sysfs
from hostpassd.host.sysfs import VIRTUAL
from hostpassd.model.events import HostUse, Nodes, Uses, host_use
from hostpassd.model.text import clean

# What the host cannot live without, with all that is mounted below it. /efi is where some mount what others have at
# /boot/efi.
_SYSTEM_FOLDERS = ("/boot", "/efi", "/usr", "/var")

# But not what is mounted below these: users make folders there (/var/home is /home where / is read-only), and have
# things mounted on them.
_USERS_FOLDERS = ("/var/home", "/var/tmp")

# File systems over several devices: they have no device's number, and the kernel tells one of the devices, or all with
# colons, as their source. The source of any other is whatever the one who mounts says, and users may mount FUSE.
_NAME_THEIR_DEVICES = frozenset({"btrfs", "bcachefs"})

_DEPTH = 16  # storage stacks are no deeper than this; a loop in them ends here

# By the start of dm/uuid.
_MAPPINGS = (("LVM-", "LVM volume"), ("CRYPT-", "LUKS"), ("mpath-", "multipath"))


@dataclasses.dataclass(frozen=True, slots=True)
class BlockNode:
    """What udev knows of a block device, in the tree or not."""

    nodes: tuple[str, ...]  # its own and the links to it: /dev/dm-0, /dev/mapper/vg-data, /dev/vg/data
    pool: str = ""  # the ZFS pool that it is a member of


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
            self._note("mount", self._under_mount(mount), system=mount.system, mount_points=mount.point)
        self._note_state_folder()
        for path, is_file in self._swaps:
            bases = self._under_file(path) if is_file else self._under(self._named(path))
            self._note("swap", bases, system=True, paths=path if is_file else "")
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

    def _note(self, code: str, bases: Iterable[Base], *, system: bool = False, **details: str) -> None:
        """Notes the use CODE of all BASES. DETAILS: an array each, of which this is one; '': of none."""
        told = {key: (clean(text),) if text else () for key, text in details.items()}
        for base in bases:
            use = host_use(code, system=system, volumes=(clean(str(base)),), **told)
            self._found.setdefault(base.path, {})[use] = None

    def _note_state_folder(self) -> None:
        mount = mount_of(self._state_folder, self._mounts) if self._state_folder else None
        if mount is not None and not mount.system:
            self._note("state", self._under_mount(mount), system=True, paths=self._state_folder)

    def _note_stacks(self) -> None:
        folder = f"{VIRTUAL}block"
        for name in self._sysfs.names(folder):
            if self._sysfs.names(f"{folder}/{name}/slaves"):
                self._note("storage-stack", self._under(f"{folder}/{name}"))
        for pool, members in self._members.items():
            for member in members:
                self._note("storage-stack", self._in_pool(pool, self._under(member)))

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
        return self._in_pool(
            pool, [b for member in self._members.get(pool, ()) for b in self._under(member, depth + 1)]
        )

    def _in_pool(self, pool: str, bases: list[Base]) -> list[Base]:
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
