"""What was done and by whom, for `journalctl HOSTPASSD_DEVICE=...`: fields over the journal's native protocol.

The protocol (NAME=value lines in one datagram) is systemd's "Native Journal Protocol"; values here hold no newline.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter, deque

from hostpassd import names
from hostpassd.model.text import clean

log = logging.getLogger(__name__)

_SOCKET = "/run/systemd/journal/socket"

# Characters of a value.
_VALUE_LIMIT = 4096

# Records that wait for room in the journal's socket.
_WAITING_LIMIT = 256

# Anybody can be refused as often as they like. So only so many refusals in each period have a record of their own; the
# rest are counted, and one record for each user tells their number when the period ends.
_PERIOD = 60.0  # seconds
_OF_A_USER = 5
_OF_ALL = 60
_USERS_COUNTED = 20  # users with a number of their own; all others share one
_OTHERS = -1  # all the others, together


class AuditLog:
    """Writes records, of refusals a bounded number. What the journal has no room for waits; past that it is counted."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[bytes, str]] = deque()  # datagrams, each with its text for the log
        self._lost = 0
        self._journal: socket.socket | None = None  # while something waits
        self._refusals: Counter[int] = Counter()  # in this period, by user id
        self._left_out: Counter[int] = Counter()

    def write(self, message_id: str, text: str, **fields: str) -> None:
        """Writes TEXT with HOSTPASSD_<FIELD> for each of FIELDS; to the log where there is no journal."""
        rows = {"MESSAGE": text, "MESSAGE_ID": message_id, "PRIORITY": "5", "SYSLOG_IDENTIFIER": "hostpassd"}
        rows |= {f"HOSTPASSD_{name.upper()}": value for name, value in fields.items() if value}
        data = "".join(f"{name}={clean(value, _VALUE_LIMIT)}\n" for name, value in rows.items()).encode()
        by = f" (by user {fields['uid']})" if fields.get("uid") else ""
        self._send(data, clean(text, _VALUE_LIMIT) + by)

    def refusal(self, uid: int, text: str, **fields: str) -> None:
        """Writes that user UID was refused something, or counts it if there are many such records already."""
        if not self._refusals and not self._left_out:
            asyncio.get_running_loop().call_later(_PERIOD, self._end_period)
        if self._refusals[uid] < _OF_A_USER and self._refusals.total() < _OF_ALL:
            self._refusals[uid] += 1
            self.write(names.MESSAGE_OPERATION, text, **fields, uid=str(uid))
        elif uid in self._left_out or len(self._left_out) < _USERS_COUNTED:
            self._left_out[uid] += 1
        else:
            self._left_out[_OTHERS] += 1

    def _end_period(self) -> None:
        for uid, count in self._left_out.items():
            who = f"user {uid}" if uid != _OTHERS else "other users"
            self.write(
                names.MESSAGE_OPERATION,
                f"{count} more calls of {who} were refused within {_PERIOD:g} seconds, with no record of each",
                operation="refusals",
                left_out=str(count),
                uid=str(uid) if uid != _OTHERS else "",
            )
        self._refusals.clear()
        self._left_out.clear()

    # --- the journal's socket ---

    def _send(self, data: bytes, text: str) -> None:
        if self._journal:
            self._wait(data, text)
            return
        journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            journal.connect(_SOCKET)
            journal.send(data)
        except BlockingIOError:
            self._journal = journal
            self._wait(data, text)
            asyncio.get_running_loop().add_writer(journal, self._send_waiting)
            return
        except OSError:
            log.info("%s", text)
        journal.close()

    def _wait(self, data: bytes, text: str) -> None:
        if len(self._waiting) < _WAITING_LIMIT:
            self._waiting.append((data, text))
        else:
            self._lost += 1

    def _send_waiting(self) -> None:
        """Called when the journal has room again."""
        journal, self._journal = self._journal, None
        assert journal
        asyncio.get_running_loop().remove_writer(journal)
        journal.close()
        waiting, self._waiting = self._waiting, deque()
        for data, text in waiting:
            self._send(data, text)
        if self._lost and not self._journal:
            lost, self._lost = self._lost, 0
            self.write(names.MESSAGE_OPERATION, f"{lost} records are lost: the journal had no room for them")
