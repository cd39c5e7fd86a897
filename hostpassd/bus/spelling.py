"""How callers spell devices and machines, in the words that `find` knows: no object paths, no links."""

from __future__ import annotations

import asyncio
import os
import re

from hostpassd import names
from hostpassd.state.find import TEXT_LIMIT

# The folders of /sys whose links lead to devices; none of the kernel's links there leads out of /sys.
_LINKS = ("/sys/class/", "/sys/bus/", "/sys/dev/")
_PARTS = 32  # of a path that is followed

# The last part of a device's object path. No name that the kernel itself gives looks like that.
_NAME = re.compile(r"[A-Za-z0-9]+_[A-Za-z0-9_]*")
_UUID = re.compile(r"[0-9a-fA-F]{8}(_[0-9a-fA-F]{4}){3}_[0-9a-fA-F]{12}")


async def device_text(text: str) -> str:
    """TEXT for `find`: of an object path the name, of a link in /sys where it leads, else as it is."""
    name = text.removeprefix(names.DEVICES + "/")
    return name if name != text and _NAME.fullmatch(name) else await followed(text)


def machine_text(text: str) -> str:
    """TEXT for `find`: of an object path the UUID, else as it is."""
    uuid = text.removeprefix(names.MACHINES + "/")
    return uuid.replace("_", "-") if uuid != text and _UUID.fullmatch(uuid) else text


async def followed(text: str) -> str:
    """TEXT, or where it leads if it is one of the paths in /sys that the kernel makes as links to devices.

    `find` looks nothing up outside the state. In a thread: the loop waits for no file system.
    """
    link = _link(text)
    return await asyncio.to_thread(os.path.realpath, link) if link else text


def _link(text: str) -> str:
    """The path to follow for TEXT, by its words alone (what `..` leaves is never walked through); '': none."""
    path = os.path.normpath(text) if len(text) <= TEXT_LIMIT else ""
    return path if path.startswith(_LINKS) and path.count("/") <= _PARTS else ""
