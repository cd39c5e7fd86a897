"""dbus-broker on a private socket, for `busd.PrivateBus`: a program that becomes dbus-broker-launch.

    unshare --mount --propagation private python3 tests/bus/broker.py DESCRIPTOR CONFIGURATION [ROOT]

dbus-broker-launch is made for systemd: it takes its listening socket (here DESCRIPTOR) from it, writes to the journal
and has systemd start services. In a mount namespace of its own it finds a journal whose messages come out on stderr,
and a systemd that lets it in and then says nothing. ROOT is where its package is unpacked, if it is not installed.
"""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import socket
import sys
from pathlib import Path

PROGRAM = "/usr/bin/dbus-broker-launch"  # which starts /usr/bin/dbus-broker
RUNTIME = "/run/systemd"
FIRST_PASSED = 3  # the descriptor that a service finds its socket at
PR_SET_PDEATHSIG = 1


def main(listening: int, configuration: str, root: str = "") -> None:
    """Becomes dbus-broker-launch on the socket LISTENING; a child plays the parts of journal and systemd."""
    _mount("tmpfs", RUNTIME, "mode=755")
    if root:
        _mount("overlay", "/usr/bin", f"lowerdir={root}/usr/bin:/usr/bin")
    Path(RUNTIME, "journal").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal, socket.socket(socket.AF_UNIX) as manager:
        journal.bind(f"{RUNTIME}/journal/socket")
        manager.bind(f"{RUNTIME}/private")
        manager.listen()
        if os.fork() == 0:
            os.close(listening)
            _end_with_parent()
            _serve(journal, manager)
    _become(listening, configuration)


def _become(listening: int, configuration: str) -> None:
    with socket.socket(fileno=listening) as bus:
        address = f"unix:path={bus.getsockname()}"
        os.dup2(bus.detach(), FIRST_PASSED)
    os.set_inheritable(FIRST_PASSED, True)
    passed = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid()), "DBUS_SYSTEM_BUS_ADDRESS": address}
    os.execve(PROGRAM, [PROGRAM, "--scope", "system", "--config-file", configuration], os.environ | passed)


def _mount(kind: str, target: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind.encode(), target.encode(), kind.encode(), 0, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _serve(journal: socket.socket, manager: socket.socket) -> None:
    """Lets in whoever comes to systemd, and shows what comes to the journal."""
    chosen = selectors.DefaultSelector()
    chosen.register(journal, selectors.EVENT_READ)
    chosen.register(manager, selectors.EVENT_READ)
    while True:
        for key, _ in chosen.select():
            if key.fileobj is journal:
                _show(journal.recv(1 << 16))
            elif key.fileobj is manager:
                chosen.register(manager.accept()[0], selectors.EVENT_READ)
            else:
                assert isinstance(key.fileobj, socket.socket)
                said = key.fileobj.recv(1 << 16)
                if b"BEGIN" in said:
                    key.fileobj.sendall(b"OK 0123456789abcdef0123456789abcdef\r\nAGREE_UNIX_FD\r\n")
                elif not said:
                    chosen.unregister(key.fileobj)


def _show(row: bytes) -> None:
    for line in row.splitlines():
        if line.startswith(b"MESSAGE="):
            print(line.removeprefix(b"MESSAGE=").decode(errors="replace"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
