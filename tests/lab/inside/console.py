"""Types one command into a guest's shell, through its serial console's socket, and prints what it said.

Usage: console.py SOCKET SECONDS COMMAND. Ends with the command's own status, or 124 after SECONDS without an answer.
"""

from __future__ import annotations

import re
import socket
import sys
import time
import uuid


def main(path: str, seconds: float, command: str) -> int:
    token = uuid.uuid4().hex
    until = time.monotonic() + seconds
    said = b""
    end = re.compile(rb"begin-%b\r?\n(.*)end-(\d+)-%b" % (token.encode(), token.encode()), re.DOTALL)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as console:
        console.connect(path)
        console.sendall(f"echo begin-{token}; {command}; echo end-$?-{token}\n".encode())
        while (found := end.search(said)) is None:
            console.settimeout(max(0.001, until - time.monotonic()))
            try:
                data = console.recv(65536)
            except TimeoutError:
                data = b""
            if not data:
                sys.stderr.write(said.decode(errors="replace"))
                return 124
            said += data
    sys.stdout.write(found[1].decode(errors="replace").replace("\r\n", "\n"))
    return int(found[2])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2]), sys.argv[3]))
