"""Debian in a folder, from the package sources that this machine itself has; and the cache such folders are in.

The lab makes its image and the bare machines their roots here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

FORGET_AFTER = 7 * 86400  # seconds in which nobody asked for a folder

# What of apt's settings says how its mirror is reached; all else of a root's is as Debian has it.
REACHING = re.compile(r"Acquire::(http|https|Check-)")

# What in the environment says the same of pip's; and the authorities that this machine trusts, as a root gets them.
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PIP = ("PIP_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_PROXY", "PIP_DEFAULT_TIMEOUT")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
TRUSTED = "usr/local/share/trusted-by-the-host.crt"


def cache_folder() -> Path:
    """Where everything that can be made again is kept."""
    if named := os.environ.get("HOSTPASSD_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "hostpassd"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock at PATH; a second maker waits here and then finds the work done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fingerprint(*parts: str) -> str:
    """A name for everything that makes a folder what it is."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def forget_old(cache: Path, pattern: str) -> None:
    """Removes the folders that nobody has asked for in a week."""
    for folder in cache.glob(pattern):
        if time.time() - folder.stat().st_mtime > FORGET_AFTER:
            shutil.rmtree(folder)


def need_root(what: str) -> None:
    """Raises PermissionError if WHAT, which makes files of several owners, is not done by root."""
    if os.geteuid() != 0:
        raise PermissionError(f"{what} needs root: it makes a file system with all its owners")


def debootstrap(
    root: Path, suite: str, packages: list[str], *, options: list[str] | None = None, hooks: list[str] | None = None
) -> None:
    """Installs PACKAGES of SUITE into a new folder; OPTIONS are apt's, HOOKS mmdebstrap's arguments."""
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--quiet", f"--include={','.join(packages)}"]
    command += [f"--aptopt={option}" for option in [*apt_options(), *(options or [])]]
    run([*command, *(hooks or []), suite, str(root), *mirror()])


def mirror() -> list[str]:
    """The Debian mirror this machine itself installs from; none where there is none, and mmdebstrap's own holds."""
    for line in _outputs("apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"):
        label, _, address = line.partition(" ")
        if label == "Debian":
            return [address]
    return []


def apt_options() -> list[str]:
    """The lines of this machine's apt configuration that say how the mirror is reached: proxies, checks of dates."""
    lines = _outputs("apt-config", "dump", "--no-empty", '--format=%F "%v";%n')
    return [line for line in lines if REACHING.match(line)]


def give_access(root: Path, suite: str) -> dict[str, str]:
    """Has the Debian in ROOT reach the package sources as this machine does. Returns what its environment takes."""
    for name in ("hosts", "resolv.conf"):
        (root / "etc" / name).unlink(missing_ok=True)
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    lines = apt_options()
    variables = {name: os.environ[name] for name in PROXIES + PIP if name in os.environ}
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, root / TRUSTED)
        lines.append(f'Acquire::https::CAInfo "/{TRUSTED}";')
        variables["PIP_CERT"] = f"/{TRUSTED}"
    (root / "etc/apt/apt.conf.d/90mirror").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for address in mirror():
        (root / "etc/apt/sources.list").write_text(f"deb {address} {suite} main\n", encoding="utf-8")
    return variables


def _outputs(*command: str) -> list[str]:
    """The lines a command prints; none where it is not installed."""
    if shutil.which(command[0]) is None:
        return []
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def run(command: list[str]) -> None:
    """Runs a step of the making; its output is shown only if it fails."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode != 0:
        sys.stderr.write(done.stdout.decode(errors="replace"))
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}")
