"""What was done and by whom, for `journalctl HOSTPASSD_DEVICE=...`: fields over the journal's native protocol.

The protocol (NAME=value lines in one datagram) is systemd's "Native Journal Protocol"; values here hold no newline.
"""

from __future__ import annotations

import logging
import socket

from hostpassd.host.device import clean

log = logging.getLogger(__name__)

_SOCKET = "/run/systemd/journal/socket"


def audit(message_id: str, text: str, **fields: str) -> None:
    """Writes TEXT with HOSTPASSD_<FIELD> for each of FIELDS; to the log where there is no journal."""
    rows = {"MESSAGE": text, "MESSAGE_ID": message_id, "PRIORITY": "5", "SYSLOG_IDENTIFIER": "hostpassd"}
    rows |= {f"HOSTPASSD_{name.upper()}": value for name, value in fields.items() if value}
    data = "".join(f"{name}={clean(value, 4096)}\n" for name, value in rows.items()).encode()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as journal:
            journal.sendto(data, _SOCKET)
    except OSError:
        log.info("%s", clean(text, 4096))
