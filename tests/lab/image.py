"""The image the lab boots: a Debian with systemd, libvirt and QEMU, built once and kept in the cache.

The image is a folder: `root` (its files, from which the outside also runs the image's own QEMU), `disk.raw` (the same
files as a disk), `vmlinuz` and `initrd`. Its name is a hash of everything that made it, so a changed recipe is a new
image and an unchanged one is never built twice.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.roots import cache_folder, debootstrap, fingerprint, forget_old, locked, need_root, run

HERE = Path(__file__).resolve().parent
FILES = HERE / "files"
SUITE = "trixie"
RECIPE_VERSION = 1
DISK_SIZE = "6G"

PACKAGES = """
    linux-image-amd64 initramfs-tools busybox-static cpio xz-utils binutils kmod
    systemd systemd-sysv udev dbus dbus-bin polkitd openssh-server procps util-linux fdisk less strace
    libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients libvirt-dbus qemu-system-x86 qemu-utils mdevctl
    pciutils pci.ids usbutils usb.ids lsscsi iproute2 udisks2 lvm2 cryptsetup-bin mdadm e2fsprogs dosfstools
    python3 python3-dbus-next python3-libvirt python3-pyudev python3-lxml
    python3-rich python3-argcomplete
""".split()  # noqa: SIM905

MTTY_PACKAGES = ["linux-headers-amd64", "make", "gcc", "xz-utils"]
MTTY_SOURCE = "samples/vfio-mdev/mtty.c"
NO_RECOMMENDS = 'APT::Install-Recommends "false";'


@dataclass(frozen=True)
class Image:
    """A finished image in the cache, and the key that opens its root account."""

    folder: Path
    key: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"


def ready_image(rebuild: bool = False) -> Image:
    """The image, built first if the cache does not have it."""
    cache = cache_folder()
    with locked(cache / "lab.lock"):
        key = _ssh_key(cache)
        folder = cache / f"image-{_fingerprint(key)}"
        if rebuild or not folder.exists():
            _build(cache, folder, key)
        os.utime(folder)
        forget_old(cache, "image-*")
    return Image(folder, key)


def _ssh_key(cache: Path) -> Path:
    key = cache / "ssh_key"
    if not key.exists():
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(key)])
    return key


def _fingerprint(key: Path) -> str:
    """A name for everything that makes the image what it is."""
    files = sorted(path for path in FILES.rglob("*") if path.is_file())
    parts = [_base_name(), str(RECIPE_VERSION), DISK_SIZE, *MTTY_PACKAGES, _public_key(key)]
    for path in files:
        parts += [str(path.relative_to(FILES)), oct(path.stat().st_mode & 0o100), path.read_text()]
    return fingerprint(*parts)


def _base_name() -> str:
    return f"packages-{fingerprint(SUITE, str(RECIPE_VERSION), *sorted(PACKAGES))}"


def _public_key(key: Path) -> str:
    return key.with_suffix(".pub").read_text()


def _build(cache: Path, folder: Path, key: Path) -> None:
    """Makes the image under a temporary name and gives it its own only when it is whole."""
    need_root("building the lab's image")
    for leftover in cache.glob("*.partial"):
        shutil.rmtree(leftover)
    base = _packages(cache)
    kernel = next((base / "lib/modules").iterdir()).name
    module = _mtty(cache, kernel)
    partial = cache / f"{folder.name}.partial"
    root = partial / "root"
    partial.mkdir()
    run(["cp", "-a", str(base), str(root)])
    _say("customising")
    _customise(root, kernel, module, _public_key(key))
    for name in ("vmlinuz", "initrd"):
        shutil.copy(root / "var/lib/libvirt/boot" / name, partial / name)
    _say("making the disk")
    disk = str(partial / "disk.raw")
    run(["mke2fs", "-q", "-t", "ext4", "-L", "host", "-E", "root_owner=0:0", "-d", str(root), disk, DISK_SIZE])
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _say("done")


def _packages(cache: Path) -> Path:
    """The packages installed in a folder and nothing else done: kept, so that a changed file costs seconds."""
    kept = cache / _base_name()
    if not kept.exists():
        _say("installing the packages")
        partial = cache / f"{kept.name}.partial"
        folder = '"$1/etc/initramfs-tools/conf.d"'
        small = f"mkdir -p {folder} && echo MODULES=list >{folder}/lab.conf"
        debootstrap(partial, SUITE, PACKAGES, options=[NO_RECOMMENDS], hooks=[f"--essential-hook={small}"])
        partial.rename(kept)
    return kept


def _customise(root: Path, kernel: str, module: Path, public_key: str) -> None:
    """Puts the lab's own files into the image and has the image set itself up."""
    run(["cp", "-r", "--preserve=mode", f"{FILES}/.", str(root)])
    extra = root / "lib/modules" / kernel / "extra"
    extra.mkdir()
    shutil.copy(module, extra / "mtty.ko")
    (root / "root/.ssh").mkdir(parents=True, exist_ok=True)
    (root / "root/.ssh/authorized_keys").write_text(public_key)
    run(["chroot", str(root), "/usr/lib/lab/customise", kernel])


def _mtty(cache: Path, kernel: str) -> Path:
    """The kernel's sample driver of mediated devices, built for that kernel; Debian ships only its source."""
    kept = cache / f"mtty-{kernel}.ko"
    if kept.exists():
        return kept
    _say(f"building mtty for {kernel}")
    root = cache / "mtty.partial"
    source = "linux-source-" + ".".join(kernel.split(".")[:2])
    fetch = f'chroot "$1" sh -c "cd /usr/src && apt-get download {source}"'
    debootstrap(root, SUITE, MTTY_PACKAGES, options=[NO_RECOMMENDS], hooks=[f"--customize-hook={fetch}"])
    if not (root / "lib/modules" / kernel).exists() and not (root / f"usr/src/linux-headers-{kernel}").exists():
        raise RuntimeError(f"the archive has no headers for {kernel}: build the image again")
    build = f"""
        set -e
        mkdir /usr/src/mtty && cd /usr/src/mtty
        dpkg-deb --fsys-tarfile /usr/src/{source}_*.deb | tar -xO --wildcards '*.tar.xz' \\
            | tar -xJO --wildcards '*/{MTTY_SOURCE}' > mtty.c
        echo 'obj-m := mtty.o' > Makefile
        make -C /usr/src/linux-headers-{kernel} M=/usr/src/mtty modules
    """
    run(["chroot", str(root), "sh", "-c", build])
    made = kept.with_suffix(".new")
    shutil.copy(root / "usr/src/mtty/mtty.ko", made)
    made.rename(kept)
    shutil.rmtree(root)
    return kept


_started = time.monotonic()


def _say(step: str) -> None:
    print(f"lab image: {time.monotonic() - _started:4.0f} s  {step}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(ready_image(rebuild="--rebuild" in sys.argv[1:]).folder)
