"""What mounts and swap rest on, through stacks, on physical disks."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpassd.host.reading import Sysfs
from hostpassd.host.storage import BlockNode, Mount, Storage, mount_of, own_mounts, parse_mounts, parse_swaps
from hostpassd.model.events import HostUse, Uses, host_use

SDA = "/sys/devices/pci0/host0/block/sda"
SDB = "/sys/devices/pci0/host0/block/sdb"


def mounted(point: str, volume: str, *, system: bool = False) -> HostUse:
    return host_use("mount", system=system, mount_points=(point,), volumes=(volume,))


class Disks:
    """A small sysfs of block devices."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.swaps: list[tuple[str, bool]] = []
        self.mounts: list[Mount] = []
        self.blocks: dict[str, BlockNode] = {}
        self.pools: list[str] = []
        self.add(SDA, "8:0")
        self.add(f"{SDA}/sda1", "8:1", partition="1")
        self.add(f"{SDA}/sda2", "8:2", partition="2")
        self.add(SDB, "8:16")

    def add(self, path: str, number: str, slaves: tuple[str, ...] = (), **files: str) -> str:
        folder = self.folder(path)
        folder.mkdir(parents=True)
        for name, text in files.items():
            file = folder / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        self.link(f"/sys/dev/block/{number}", path)
        self.link(f"/sys/class/block/{folder.name}", path)
        for slave in slaves:
            self.link(f"{path}/slaves/{Path(slave).name}", slave)
        return path

    def mapped(self, minor: int, name: str, uuid: str, *slaves: str) -> str:
        path = f"/sys/devices/virtual/block/dm-{minor}"
        return self.add(path, f"253:{minor}", slaves, dm__name=name, dm__uuid=uuid)

    def link(self, link: str, target: str) -> None:
        self.folder(link).parent.mkdir(parents=True, exist_ok=True)
        self.folder(link).symlink_to(self.folder(target))

    def folder(self, path: str) -> Path:
        return self.root / path.removeprefix("/")

    def mount(self, number: str, point: str, root: str = "/", kind: str = "ext4", source: str = "none") -> None:
        self.mounts.append(Mount(number, root, point, kind, source))

    def uses(self, state_folder: str = "") -> Uses:
        return self.storage(state_folder).uses()

    def storage(self, state_folder: str = "") -> Storage:
        sysfs = Sysfs(str(self.root / "sys"))
        return Storage(sysfs, self.mounts, self.swaps, state_folder, self.blocks, self.pools)


@pytest.fixture
def disks(tmp_path: Path) -> Disks:
    return Disks(tmp_path)


# Texts.


def test_mountinfo() -> None:
    text = (
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
        "36 27 8:17 /a\\040b /mnt/with\\040space\\134 rw shared:1 master:2 - vfat /dev/disk\\040x rw\n"
        "nonsense\n"
    )
    assert parse_mounts(text) == [
        Mount("254:0", "/", "/", "ext4", "/dev/vda"),
        Mount("8:17", "/a b", "/mnt/with space\\", "vfat", "/dev/disk x"),
    ]


@given(st.text())
def test_whatever_is_in_mountinfo_and_swaps(text: str) -> None:
    parse_mounts(text)
    parse_swaps(text)


def test_swaps() -> None:
    text = "Filename\tType\tSize\tUsed\tPriority\n/dev/dm-1  partition\t1\t0\t-2\n/swap\\040file file 1 0 -3\n"
    assert parse_swaps(text) == [("/dev/dm-1", False), ("/swap file", True)]
    assert parse_swaps("") == []


# Which mounts count.


def test_what_a_sandbox_adds_is_not_the_hosts() -> None:
    host = [Mount("8:2", "/", "/", "ext4", "/dev/sda2"), Mount("8:17", "/", "/home", "ext4", "/dev/sdb1")]
    unit = [
        Mount("8:2", "/tmp/systemd-private-1/tmp", "/tmp", "ext4", "/dev/sda2"),
        Mount("8:2", "/var/lib/hostpassd", "/var/lib/hostpassd", "ext4", "/dev/sda2"),
        Mount("8:2", "/usr", "/usr", "ext4", "/dev/sda2"),
        Mount("8:2", "/", "/", "ext4", "/dev/sda2"),
    ]
    assert own_mounts([*host, *unit]) == host


def test_subvolumes_stay_and_a_system_mount_is_not_lost_to_the_whole() -> None:
    mounts = [
        Mount("0:40", "/@", "/", "btrfs", "/dev/sda2"),
        Mount("0:40", "/@home", "/home", "btrfs", "/dev/sda2"),
        Mount("0:40", "/", "/mnt/all", "btrfs", "/dev/sda2"),
    ]
    assert [mount.point for mount in own_mounts(mounts)] == ["/", "/mnt/all"]
    assert own_mounts(mounts[:2]) == mounts[:2]


def test_the_mount_that_a_path_is_on() -> None:
    mounts = [Mount("1:1", "/", point, "ext4", "x") for point in ("/", "/home", "/home2")]
    assert [mount_of(path, mounts) for path in ("/home/me", "/home2", "/homeless")] == [mounts[1], mounts[2], mounts[0]]
    assert mount_of("/x", []) is None


@pytest.mark.parametrize(
    ("point", "system"),
    [
        ("/", True),
        ("/boot/efi", True),
        ("/var", True),
        ("/var/lib", True),
        ("/var/home", True),
        ("/usr", True),
        ("/home", False),
        ("/variety", False),
        ("/var/home/me/disk", False),
        ("/var/tmp/disk", False),
    ],
)
def test_what_the_host_cannot_live_without(point: str, system: bool) -> None:
    assert Mount("8:1", "/", point, "ext4", "x").system is system


# Storage.


def test_a_partition_is_its_disks(disks: Disks) -> None:
    disks.mount("8:1", "/boot")
    disks.mount("8:2", "/home")
    assert disks.uses() == {SDA: (mounted("/boot", "/dev/sda1", system=True), mounted("/home", "/dev/sda2"))}


def test_through_lvm_on_luks_on_a_partition(disks: Disks) -> None:
    luks = disks.mapped(0, "luks-1", "CRYPT-LUKS2-abc", f"{SDA}/sda2")
    disks.mapped(1, "vg-root", "LVM-xyz", luks)
    disks.mount("253:1", "/")
    chain = "LVM volume vg-root on LUKS luks-1 on /dev/sda2"
    assert disks.uses() == {
        SDA: (
            mounted("/", chain, system=True),
            host_use("storage-stack", volumes=("LUKS luks-1 on /dev/sda2",)),
            host_use("storage-stack", volumes=(chain,)),
        )
    }


def test_a_raid_is_on_all_its_disks_and_holds_them_unmounted(disks: Disks) -> None:
    disks.add("/sys/devices/virtual/block/md127", "9:127", (f"{SDA}/sda1", SDB), md__level="raid1")
    assert disks.uses() == {
        SDA: (host_use("storage-stack", volumes=("RAID md127 on /dev/sda1",)),),
        SDB: (host_use("storage-stack", volumes=("RAID md127 on /dev/sdb",)),),
    }


def test_a_partition_of_a_raid(disks: Disks) -> None:
    disks.add("/sys/devices/virtual/block/md0", "9:0", (SDB,), md__level="raid1")
    disks.add("/sys/devices/virtual/block/md0/md0p1", "259:0", partition="1")
    disks.mount("259:0", "/srv")
    assert disks.uses()[SDB][0] == mounted("/srv", "/dev/md0p1 on /dev/sdb")


def test_multipath(disks: Disks) -> None:
    disks.mapped(0, "mpatha", "mpath-3600", SDA, SDB)
    disks.mount("253:0", "/data")
    assert {path: found[0] for path, found in disks.uses().items()} == {
        SDA: mounted("/data", "multipath mpatha on /dev/sda"),
        SDB: mounted("/data", "multipath mpatha on /dev/sdb"),
    }


def test_a_loop_is_on_what_its_file_is_on(disks: Disks) -> None:
    disks.add("/sys/devices/virtual/block/loop0", "7:0", loop__backing_file="/home/image")
    disks.mount("8:16", "/home")
    disks.mount("7:0", "/mnt")
    assert mounted("/mnt", "loop file /home/image on /dev/sdb") in disks.uses()[SDB]


def test_a_loop_in_a_loop_ends(disks: Disks) -> None:
    disks.add("/sys/devices/virtual/block/loop0", "7:0", loop__backing_file="/mnt/image")
    disks.mount("7:0", "/mnt")
    assert disks.uses() == {}


def test_an_nvme_head_is_on_its_controllers(disks: Disks) -> None:
    subsystem = "/sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    controller = "/sys/devices/pci0/nvme/nvme0"
    disks.folder(controller).mkdir(parents=True)
    disks.add(f"{subsystem}/nvme0n1", "259:0")
    disks.add(f"{subsystem}/nvme0n1/nvme0n1p1", "259:1", partition="1")
    disks.link(f"{subsystem}/nvme0", controller)
    disks.mount("259:1", "/")
    assert disks.uses() == {controller: (mounted("/", "/dev/nvme0n1p1", system=True),)}


def test_btrfs_is_on_all_its_devices(disks: Disks) -> None:
    for name, place in (("sda2", f"{SDA}/sda2"), ("sdb", SDB)):
        disks.link(f"/sys/fs/btrfs/1234/devices/{name}", place)
    disks.mount("0:40", "/", "/@", "btrfs", "/dev/sda2")
    assert {path: found[0] for path, found in disks.uses().items()} == {
        SDA: mounted("/", "/dev/sda2", system=True),
        SDB: mounted("/", "/dev/sdb", system=True),
    }


def test_the_nodes_of_partitions_and_volumes_lead_to_their_disks(disks: Disks) -> None:
    volume = disks.mapped(0, "vg-data", "LVM-abc", f"{SDA}/sda2", SDB)
    disks.blocks = {
        SDA: BlockNode(("/dev/sda", "/dev/disk/by-id/a")),
        f"{SDA}/sda2": BlockNode(("/dev/sda2", "/dev/disk/by-id/a-part2")),
        SDB: BlockNode(("/dev/sdb",)),
        volume: BlockNode(("/dev/dm-0", "/dev/mapper/vg-data", "/dev/vg/data")),
        disks.add("/sys/devices/virtual/block/loop0", "7:0"): BlockNode(("/dev/loop0",)),
    }
    assert disks.storage().nodes() == {
        "/dev/sda2": (SDA,),
        "/dev/disk/by-id/a-part2": (SDA,),
        "/dev/dm-0": (SDA, SDB),
        "/dev/mapper/vg-data": (SDA, SDB),
        "/dev/vg/data": (SDA, SDB),
        "/dev/loop0": (),
    }


def test_a_zfs_pool_is_on_its_members_and_holds_them_unmounted(disks: Disks) -> None:
    volume = disks.add("/sys/devices/virtual/block/zd0", "230:0")
    disks.blocks = {
        f"{SDA}/sda1": BlockNode(("/dev/sda1",), pool="tank"),
        SDB: BlockNode(("/dev/sdb",), pool="tank"),
        volume: BlockNode(("/dev/zd0", "/dev/zvol/tank/vm/disk")),
    }
    assert disks.uses() == {}
    disks.pools = ["tank", "other"]
    assert disks.uses()[SDB] == (host_use("storage-stack", volumes=("ZFS pool tank on /dev/sdb",)),)
    disks.mount("0:50", "/srv", "/", "zfs", "tank/srv")
    assert disks.uses()[SDA][0] == mounted("/srv", "ZFS pool tank on /dev/sda1")
    assert disks.storage().nodes()["/dev/zvol/tank/vm/disk"] == (SDA, SDB)


def test_a_file_system_without_a_number_on_a_mapped_device(disks: Disks) -> None:
    disks.mapped(3, "vg-data", "LVM-1", SDB)
    disks.mount("0:41", "/data", kind="btrfs", source="/dev/mapper/vg-data")
    assert disks.uses()[SDB][0] == mounted("/data", "LVM volume vg-data on /dev/sdb")


@pytest.mark.parametrize("source", ["sda1", "/dev/sda1", "/dev/sda1:/dev/sdb", "/dev/mapper/vg-data", "/dev/loop0"])
@pytest.mark.parametrize("kind", ["fuse", "fuse.sshfs", "fuse.btrfs", "tmpfs", "overlay", "nfs", "9p"])
def test_what_a_file_system_says_that_it_is_from_leads_nowhere(disks: Disks, kind: str, source: str) -> None:
    disks.mapped(0, "vg-data", "LVM-1", SDB)
    disks.add("/sys/devices/virtual/block/loop0", "7:0", loop__backing_file="/home/image")
    disks.mount("8:16", "/home")
    before = disks.uses()
    for point in ("/", "/boot", "/var/tmp/eve", "/home/eve", "/usr/share"):
        disks.mount("0:42", point, kind=kind, source=source)
    # Nor does what lies in it: the state folder, a swap file.
    disks.swaps = [("/var/tmp/eve/swap", True)]
    assert disks.uses("/var/tmp/eve/state") == before


def test_a_fuse_file_system_on_a_block_device_is_told_by_its_number(disks: Disks) -> None:
    disks.mount("8:16", "/media/me", kind="fuseblk", source="/dev/sda1")
    assert disks.uses() == {SDB: (mounted("/media/me", "/dev/sdb"),)}


def test_a_source_that_is_no_device_of_a_file_system_that_names_its_own(disks: Disks) -> None:
    disks.mount("0:40", "/data", kind="btrfs", source="/dev/not-here")
    disks.mount("0:41", "/more", kind="bcachefs", source="/etc/passwd:/dev/sdb:/dev/../sda")
    assert disks.uses() == {SDB: (mounted("/more", "/dev/sdb"),)}


def test_swap_partitions_and_files(disks: Disks) -> None:
    disks.swaps = [("/dev/sda1", False), ("/home/swap", True), ("/dev/zram0", False)]
    disks.mount("8:16", "/home")
    assert disks.uses() == {
        SDA: (host_use("swap", system=True, volumes=("/dev/sda1",)),),
        SDB: (
            mounted("/home", "/dev/sdb"),
            host_use("swap", system=True, volumes=("/dev/sdb",), paths=("/home/swap",)),
        ),
    }


def test_the_daemons_own_state_is_the_systems(disks: Disks) -> None:
    disks.mount("8:2", "/")
    disks.mount("8:16", "/srv")
    assert disks.uses("/srv/hostpassd")[SDB] == (
        mounted("/srv", "/dev/sdb"),
        host_use("state", system=True, volumes=("/dev/sdb",), paths=("/srv/hostpassd",)),
    )


def test_what_a_mount_point_is_called_cannot_harm(disks: Disks) -> None:
    disks.mount("8:1", "/mnt/\x1b[31m\n\udcff")
    assert disks.uses()[SDA][0] == mounted("/mnt/[31m", "/dev/sda1")
