"""The option rom-file: a path that a caller gives, of a file that QEMU is to read."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence

from hostpassd import errors
from hostpassd.base.threads import in_thread
from hostpassd.model.text import clean

# What a path has that is not as short as it could be.
_ODD = re.compile(r"//|/\.{1,2}(/|$)|/$")

# Seconds for a look at it: an administrator's folder can be another host's.
_PATIENCE = 5.0


async def check(path: str, folders: Sequence[str]) -> None:
    """Raises InvalidOption unless PATH is a file below one of FOLDERS, links followed.

    What is not below one of them by its words alone is not looked up. Error: TimedOut, its file system does not answer.
    """
    allowed = [folder for folder in folders if path.startswith(f"{folder}/")]
    if allowed and clean(path) == path and not _ODD.search(path):
        looking = in_thread(lambda: _is_below(path, allowed), "rom-file")
        await asyncio.wait({looking}, timeout=_PATIENCE)
        if not looking.done():
            raise errors.TimedOut(f"The file system of {path} does not answer: see to it, or use another file.")
        if looking.result():
            return
    raise errors.InvalidOption(
        f"The option rom-file is the whole path of a file below {' or '.join(folders)}, with no link that leads out."
    )


def _is_below(path: str, folders: Sequence[str]) -> bool:
    real = os.path.realpath(path)
    return os.path.isfile(real) and any(real.startswith(f"{os.path.realpath(folder)}/") for folder in folders)
