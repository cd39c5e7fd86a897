"""The D-Bus face of the daemon. Nothing below this package knows D-Bus."""

from __future__ import annotations

import sys


def leave_out_glib() -> None:
    """Keeps dbus-next from loading GLib's bindings, where they are installed, for a part of it that is not used.

    That is a tenth of the daemon's start. Call it before anything imports dbus-next; this process cannot use `gi` then.
    """
    sys.modules["gi"] = None  # type: ignore[assignment]
