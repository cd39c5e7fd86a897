"""GDBus's own client of object managers, for test_daemon.py: a program.

    python3 tests/bus/gdbus.py ADDRESS

For each line on its input it writes one: what the client has by then, as JSON, {path: {interface: {property: value}}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from gi.repository import Gio, GLib

NAME, ROOT = "org.hostpassd1", "/org/hostpassd1"


def main(address: str) -> None:
    flags = Gio.DBusConnectionFlags.AUTHENTICATION_CLIENT | Gio.DBusConnectionFlags.MESSAGE_BUS_CONNECTION
    connection = Gio.DBusConnection.new_for_address_sync(address, flags, None, None)
    client = Gio.DBusObjectManagerClient.new_sync(
        connection, Gio.DBusObjectManagerClientFlags.DO_NOT_AUTO_START, NAME, ROOT, None, None, None
    )
    print(json.dumps(known(client)), flush=True)
    for _ in sys.stdin:
        # Its answer comes after all that was signalled before, and that is taken in by the loop.
        connection.call_sync(NAME, ROOT, "org.freedesktop.DBus.Peer", "Ping", None, None, 0, -1, None)
        while GLib.MainContext.default().iteration(may_block=False):
            pass
        print(json.dumps(known(client)), flush=True)


def known(client: Any) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        each.get_object_path(): {face.get_interface_name(): values(face) for face in each.get_interfaces()}
        for each in client.get_objects()
    }


def values(proxy: Any) -> dict[str, Any]:
    return {name: proxy.get_cached_property(name).unpack() for name in proxy.get_cached_property_names() or ()}


if __name__ == "__main__":
    main(sys.argv[1])
