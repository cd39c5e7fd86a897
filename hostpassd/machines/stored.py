"""Watching libvirt's configuration folder: it sends no event when others change only the stored half of a machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, Protocol

from hostpassd.base.tasks import Tasks
from hostpassd.errors import HostpassError
from hostpassd.machines.inotify import Watch

# libvirt writes NAME.xml.new and renames it, and one operation can do so twice. Seconds.
_SETTLE = 0.1

_FOLDERS = {
    "qemu:///system": "/etc/libvirt/qemu",
    "qemu+unix:///system": "/etc/libvirt/qemu",
    "xen:///system": "/etc/libvirt/libxl",
    "lxc:///system": "/etc/libvirt/lxc",
}


class Reader(Protocol):
    """What reads machines again: a Hypervisor."""

    async def refresh(self) -> None: ...

    async def refresh_machine(self, uuid_or_name: str) -> None: ...


def folder_of(uri: str) -> str | None:
    """The folder in which the libvirt of URI keeps the stored halves, or None where this host has none for it."""
    return _FOLDERS.get(uri.partition("?")[0])


class StoredWatch:
    """Has HYPERVISOR read a machine again when its file in FOLDER changes. To be made on the running event loop.

    The folder can come later, go, or be replaced: then all machines are read again.
    """

    def __init__(self, hypervisor: Reader, folder: str) -> None:
        self._hypervisor = hypervisor
        self._names: set[str] = set()
        self._everything = False
        self._timer: asyncio.TimerHandle | None = None
        self._reading = Tasks()
        self._watch = Watch(folder, self._changed)

    def close(self) -> None:
        """End the watch and what it has begun."""
        self._watch.close()
        if self._timer:
            self._timer.cancel()
        self._reading.cancel()

    def _changed(self, files: set[str]) -> None:
        names = {name.removesuffix(".xml") for name in files if name.endswith(".xml")}
        # libvirt cannot be asked for a name that is not UTF-8.
        self._everything = self._everything or not files or not all(map(_is_text, names))
        self._names |= names
        if (self._names or self._everything) and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SETTLE, self._read)

    def _read(self) -> None:
        self._timer = None
        names, self._names = self._names, set()
        everything, self._everything = self._everything, False
        self._reading.start(self._read_again(names, everything))

    async def _read_again(self, names: set[str], everything: bool) -> None:
        if everything:
            await self._quietly(self._hypervisor.refresh())
            return
        await asyncio.gather(*(self._quietly(self._hypervisor.refresh_machine(name)) for name in sorted(names)))

    @staticmethod
    async def _quietly(reading: Coroutine[Any, Any, None]) -> None:
        # The machine, or the hypervisor, is gone: the one sends an event, the other is listed on its return.
        with contextlib.suppress(HostpassError):
            await reading


def _is_text(name: str) -> bool:
    """Whether the file name NAME was UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
