"""Which files of this host a caller may name as a device's ROM: those below a few folders."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import PurePosixPath

from hostpassd import errors
from hostpassd.base.threads import InOrder
from hostpassd.state.find import TEXT_LIMIT

# Where packages put what QEMU may read.
_SHARED = "/usr/share"
# Seconds that one look may take: a folder can be on a file system that hangs.
PATIENCE = 5.0


class RomFiles:
    """The files below /usr/share and the configured FOLDERS.

    Those of each folder are looked at in one thread. When a look has taken too long no other is begun in its folder
    until it ends: anybody can ask for as many as they like.
    """

    def __init__(self, folders: Sequence[str]) -> None:
        self._threads = {folder: InOrder("rom-files") for folder in (_SHARED, *folders)}
        self._hanging: dict[str, asyncio.Future[str]] = {}  # by folder

    async def find(self, text: str) -> str:
        """The file that TEXT names, with no link left in its path.

        Errors: InvalidOption, there is none below these folders; TimedOut, their file system does not answer.
        """
        # By its words alone: what a caller writes is not followed to anywhere else.
        folder = next((folder for folder in self._threads if _is_path(text) and _is_below(text, folder)), "")
        found = await self._look(text, folder) if folder else ""
        if not found:
            raise errors.InvalidOption(
                "The option rom-file is the absolute path of a file that hostpassd can see below /usr/share or one of "
                f"the configuration's rom-folders, with no link that leads out, which {text[:80]!r} is not."
            )
        return found

    async def _look(self, path: str, folder: str) -> str:
        hanging = self._hanging.get(folder)
        if hanging is None or hanging.done():
            looking = asyncio.get_running_loop().run_in_executor(self._threads[folder], _found, path, folder)
            await asyncio.wait({looking}, timeout=PATIENCE)
            if looking.done():
                return looking.result()
            self._hanging[folder] = looking
        raise errors.TimedOut(f"A file below {folder} does not answer: mend its file system, or leave rom-file out.")


def _is_path(text: str) -> bool:
    return len(text) <= TEXT_LIMIT and text.isprintable() and text == os.path.normpath(text)


def _is_below(path: str, folder: str) -> bool:
    return path != folder and PurePosixPath(path).is_relative_to(folder)


def _found(path: str, folder: str) -> str:
    """Where PATH leads, if that is a file below FOLDER; '': it is not. It can hang."""
    try:
        real = os.path.realpath(path, strict=True)
        inside = _is_below(real, os.path.realpath(folder))
        return real if inside and real.isprintable() and stat.S_ISREG(os.stat(real).st_mode) else ""
    except OSError:
        return ""
