"""The host's devices and what they are used for, as one end of the daemon."""

from __future__ import annotations

from collections.abc import Callable

from hostpassd.host.reading import Reader
from hostpassd.host.udev import Armed, Udev
from hostpassd.host.uses import HostUses
from hostpassd.model.events import Event, FilesHang


class Host:
    """Tells EMIT, on the loop, what is plugged in and what the host uses it for, from then on as it changes.

    STATE_FOLDER: where the daemon keeps its own state, which it cannot live without.
    """

    def __init__(self, emit: Callable[[Event], None], state_folder: str, armed: Armed | None = None) -> None:
        self._emit = emit
        self._hanging: frozenset[str] = frozenset()
        reader = Reader(self.files_hang)
        self._udev = Udev(emit, self._uses_changed, reader, armed)
        self._uses = HostUses(emit, self._udev.node_of, self._udev.blocks, self._udev.nics, state_folder, reader)
        self.scan, self.settled = self._udev.scan, self._udev.settled
        self.read_uses = self._uses.read_now

    async def start(self) -> None:
        """Listens, reads everything, and emits it. Raises OSError."""
        self._udev.arm()
        await self.scan()
        self._uses.start()
        await self.read_uses()

    def close(self) -> None:
        """Listens no more."""
        self._uses.close()
        self._udev.close()

    def _uses_changed(self) -> None:
        self._uses.refresh()

    def files_hang(self, files: tuple[str, ...]) -> None:
        """FILES hang, other ones than before: what was not read of one that answers again is read now."""
        if self._hanging - set(files):
            self._udev.scan_soon()
            self._uses.refresh()
        self._hanging = frozenset(files)
        self._emit(FilesHang(files))
