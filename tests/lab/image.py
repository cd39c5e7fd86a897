"""The image the lab boots: a Debian with systemd, libvirt and QEMU, built once and kept in the cache.

The image is a folder: `root` (its files, from which the outside also runs the image's own QEMU), `disk.raw` (the same
files as a disk), `vmlinuz` and `initrd`. Its name is a hash of everything that made it, so a changed recipe is a new
image and an unchanged one is never built twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
PROXY = "Acquire::http::Proxy"


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


def cache_folder() -> Path:
    """Where everything that can be made again is kept."""
    if named := os.environ.get("HOSTPASSD_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hostpassd"


def ready_image(rebuild: bool = False) -> Image:
    """The image, built first if the cache does not have it."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lab.lock"):
        key = _ssh_key(cache)
        folder = cache / f"image-{_fingerprint(key)}"
        if rebuild or not folder.exists():
            _build(cache, folder, key)
        os.utime(folder)
        _forget_old_images(cache)
    return Image(folder, key)


def _forget_old_images(cache: Path) -> None:
    """Removes the images that no recipe has asked for in a week."""
    for folder in cache.glob("image-*"):
        if time.time() - folder.stat().st_mtime > 7 * 86400:
            shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock at path; a second build waits here and then finds the image made."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _ssh_key(cache: Path) -> Path:
    key = cache / "ssh_key"
    if not key.exists():
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(key)])
    return key


def _fingerprint(key: Path) -> str:
    """A name for everything that makes the image what it is."""
    files = sorted(path for path in FILES.rglob("*") if path.is_file())
    parts = [_base_name(), str(RECIPE_VERSION), DISK_SIZE, *MTTY_PACKAGES, _public_key(key)]
    for path in files:
        parts += [str(path.relative_to(FILES)), oct(path.stat().st_mode & 0o100), path.read_text()]
    return _hash(parts)


def _base_name() -> str:
    return f"packages-{_hash([SUITE, str(RECIPE_VERSION), *sorted(PACKAGES)])}"


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _public_key(key: Path) -> str:
    return key.with_suffix(".pub").read_text()


def _build(cache: Path, folder: Path, key: Path) -> None:
    """Makes the image under a temporary name and gives it its own only when it is whole."""
    if os.geteuid() != 0:
        raise PermissionError("building the lab's image needs root: it makes a file system with all its owners")
    for leftover in cache.glob("*.partial"):
        shutil.rmtree(leftover)
    base = _packages(cache)
    kernel = next((base / "lib/modules").iterdir()).name
    module = _mtty(cache, kernel)
    partial = cache / f"{folder.name}.partial"
    root = partial / "root"
    partial.mkdir()
    _run(["cp", "-a", str(base), str(root)])
    _say("customising")
    _customise(root, kernel, module, _public_key(key))
    for name in ("vmlinuz", "initrd"):
        shutil.copy(root / "var/lib/libvirt/boot" / name, partial / name)
    _say("making the disk")
    disk = str(partial / "disk.raw")
    _run(["mke2fs", "-q", "-t", "ext4", "-L", "host", "-E", "root_owner=0:0", "-d", str(root), disk, DISK_SIZE])
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
        _debootstrap(partial, PACKAGES, [small])
        partial.rename(kept)
    return kept


def _customise(root: Path, kernel: str, module: Path, public_key: str) -> None:
    """Puts the lab's own files into the image and has the image set itself up."""
    _run(["cp", "-r", "--preserve=mode", f"{FILES}/.", str(root)])
    extra = root / "lib/modules" / kernel / "extra"
    extra.mkdir()
    shutil.copy(module, extra / "mtty.ko")
    (root / "root/.ssh").mkdir(parents=True, exist_ok=True)
    (root / "root/.ssh/authorized_keys").write_text(public_key)
    _run(["chroot", str(root), "/usr/lib/lab/customise", kernel])


def _mtty(cache: Path, kernel: str) -> Path:
    """The kernel's sample driver of mediated devices, built for that kernel; Debian ships only its source."""
    kept = cache / f"mtty-{kernel}.ko"
    if kept.exists():
        return kept
    _say(f"building mtty for {kernel}")
    root = cache / "mtty.partial"
    source = "linux-source-" + ".".join(kernel.split(".")[:2])
    fetch = f'chroot "$1" sh -c "cd /usr/src && apt-get download {source}"'
    _debootstrap(root, MTTY_PACKAGES, [], [fetch])
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
    _run(["chroot", str(root), "sh", "-c", build])
    made = kept.with_suffix(".new")
    shutil.copy(root / "usr/src/mtty/mtty.ko", made)
    made.rename(kept)
    shutil.rmtree(root)
    return kept


def _debootstrap(root: Path, packages: list[str], before: list[str], after: list[str] | None = None) -> None:
    """Installs packages into a new folder; `before` and `after` are shell hooks around their installation."""
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--quiet", f"--include={','.join(packages)}"]
    command += ['--aptopt=APT::Install-Recommends "false"']
    command += [f'--aptopt=Acquire::http::Proxy "{proxy}"' for proxy in _outputs(["apt-config", "shell", "P", PROXY])]
    command += [f"--essential-hook={hook}" for hook in before]
    command += [f"--customize-hook={hook}" for hook in after or []]
    _run([*command, SUITE, str(root), *_mirror()])


def _mirror() -> list[str]:
    """The Debian mirror this machine itself installs from; none where there is none, and mmdebstrap's own holds."""
    if shutil.which("apt-get") is None:
        return []
    for line in _outputs(["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]):
        label, _, address = line.partition(" ")
        if label == "Debian":
            return [address]
    return []


def _outputs(command: list[str]) -> list[str]:
    """The lines a command prints, each without a shell assignment around it."""
    if shutil.which(command[0]) is None:
        return []
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return [line.removeprefix("P='").removesuffix("'") for line in lines]


def _run(command: list[str]) -> None:
    """Runs a step of the build; its output is shown only if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}")


_started = time.monotonic()


def _say(step: str) -> None:
    print(f"lab image: {time.monotonic() - _started:4.0f} s  {step}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(ready_image(rebuild="--rebuild" in sys.argv[1:]).folder)
