"""A Debian that has git, sh and apt, freshly installed for each use, to which a newcomer's commands are given.

It is a folder in the cache under an overlay in memory, entered by chroot, with its own processes and mounts, this
machine's devices and network, and its package sources. Packages are downloaded once, into the cache.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests import roots
from tests.checkout import bundle

RECIPE_VERSION = 1
PACKAGES = ["git"]
USER = "newcomer"
HOMES = {"root": "/root", USER: f"/home/{USER}"}
KEEP_DOWNLOADS = 30 * 86400  # seconds
PATIENCE = 1800  # seconds for a command; all unit and bus tests are one

# The machine lives as long as this: its first process, which collects orphans, and which ends with whoever started it.
LIVE = """
set -e
read -r pid _ </proc/self/stat
mount -t tmpfs machine "$1"
mkdir "$1/changes" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=$2,upperdir=$1/changes,workdir=$1/work" machine "$1/root"
mount -t proc proc "$1/root/proc"
mount --rbind /sys "$1/root/sys"
mount --rbind /dev "$1/root/dev"
mount --bind "$3" "$1/root/var/cache/apt/archives"
mkdir "$1/root/var/cache/pip"
mount --bind "$4" "$1/root/var/cache/pip"
echo "$pid"
cat >/dev/null
exit 0
"""
NAMESPACES = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]


@dataclass(frozen=True)
class Done:
    """What a command printed, to both of its outputs, and how it ended."""

    text: str
    status: int


class Machine:
    """A bare Debian of SUITE: a context manager."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        roots.need_root("a bare machine")
        with contextlib.ExitStack() as stack:
            cache = roots.cache_folder()
            stack.enter_context(roots.locked(cache / f"bare-{self.suite}.lock"))  # apt itself wants to be alone
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hostpassd-bare-"))
            places = [folder, *map(str, (_root(cache, self.suite), _downloads(cache, self.suite), _pip_cache(cache)))]
            self._life = stack.enter_context(
                subprocess.Popen(
                    [*NAMESPACES, "sh", "-c", LIVE, "bare", *places], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            assert self._life.stdout
            self._pid = self._life.stdout.readline().decode().strip()
            if not self._pid:
                raise RuntimeError("the bare machine's file systems could not be mounted")
            self._folder = f"{folder}/root"
            self.root = Path(f"/proc/{self._pid}/root{self._folder}")
            self._environment = roots.give_access(self.root, self.suite) | {"PIP_CACHE_DIR": "/var/cache/pip"}
            self._move_in()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _move_in(self) -> None:
        """Gives the machine somebody who is not root, and both of them a clone."""
        self._as_root("useradd", "--create-home", "--shell", "/bin/bash", USER)
        with tempfile.NamedTemporaryFile(suffix=".bundle") as made:
            bundle(Path(made.name))
            shutil.copy(made.name, self.root / "srv/hostpassd.bundle")
        (self.root / "srv/hostpassd.bundle").chmod(0o644)
        for user in HOMES:
            done = self.run("git clone --quiet /srv/hostpassd.bundle ~/hostpassd", user=user, where="~")
            if done.status:
                raise RuntimeError(done.text)

    def run(self, command: str, *, user: str = "root", where: str = "~/hostpassd") -> Done:
        """Runs a line of shell as USER in its clone."""
        done = self._as_root("su", "--login", user, "--whitelist-environment", ",".join(["TERM", *self._environment]),
                             "--command", f"cd {where} && {command}")  # fmt: skip
        return Done(done.stdout, done.returncode)

    def processes(self) -> list[str]:
        """The programs that run in the machine besides its first one."""
        done = self._as_root("sh", "-c", "cat /proc/[0-9]*/comm")
        return sorted(set(done.stdout.split()) - {"sh", "cat"})

    def _as_root(self, *command: str) -> subprocess.CompletedProcess[str]:
        enter = ["nsenter", "--target", self._pid, "--mount", "--pid", "chroot", self._folder]
        return subprocess.run(
            [*enter, *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "dumb"} | self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


def _root(cache: Path, suite: str) -> Path:
    """The machine's files, made first if the cache does not have them."""
    recipe = roots.fingerprint(suite, str(RECIPE_VERSION), *PACKAGES)
    root = cache / f"bare-{suite}-{recipe}"
    if not root.exists():
        making = cache / f"{root.name}.new"
        if making.exists():
            shutil.rmtree(making)
        roots.debootstrap(making, suite, PACKAGES)
        making.rename(root)
    os.utime(root)
    roots.forget_old(cache, "bare-*-*")
    return root


def _pip_cache(cache: Path) -> Path:
    folder = cache / "pip"
    folder.mkdir(exist_ok=True)
    return folder


def _downloads(cache: Path, suite: str) -> Path:
    """The packages that were downloaded for SUITE, without those of a month ago."""
    folder = cache / f"packages-of-{suite}"
    folder.mkdir(exist_ok=True)
    for package in folder.glob("*.deb"):
        if time.time() - package.stat().st_ctime > KEEP_DOWNLOADS:
            package.unlink()
    return folder
