"""Writes who did what to systemd's journal, in fields that `journalctl HOSTPASSD_DEVICE=...` searches.

The protocol (NAME=value lines in one datagram) is systemd's "Native Journal Protocol"; values here hold no newline.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

from hostpassd import names
from hostpassd.model.events import (
    CancelAnswered,
    Event,
    MachineGone,
    MachineRead,
    MachinesListed,
    OperationRecovered,
    OperationRefused,
)
from hostpassd.model.job import Job
from hostpassd.model.machine import Hold
from hostpassd.model.text import clean
from hostpassd.state import Changes, State

log = logging.getLogger(__name__)

JOURNAL = "/run/systemd/journal/socket"

# What can come of a change that others made to a machine. All else is devices that come and go.
_BY_LIBVIRT = (MachineRead, MachineGone, MachinesListed)

# Characters of a value.
_VALUE_LIMIT = 4096

# Records that wait for room in the journal's socket.
WAITING_LIMIT = 256

# Anybody can be refused as often as they like. So only so many refusals in each period have a record of their own; the
# rest are counted, and one record for each user tells their number when the period ends.
_PERIOD = 60.0  # seconds
_OF_A_USER = 5
_OF_ALL = 60
_USERS_COUNTED = 20  # users with a number of their own; all others share one
_OTHERS = -1  # all the others, together


class AuditLog:
    """Listens to what happens, and writes the records of it."""

    def __init__(self, state: State, records: Records, is_ours: Callable[[str, str], bool]) -> None:
        """IS_OURS: whether a job of ours is at work on a machine (UUID) and a device (name)."""
        self._state = state
        self._records = records
        self._is_ours = is_ours
        self.tells_foreign = False  # set when the start is over: what was there before is nobody's change

    def notice(self, event: Event, batches: Sequence[Changes]) -> None:
        """Called for each event after the state has taken it in."""
        match event:
            case OperationRefused():
                self._refused(event)
            case CancelAnswered(job, uid, error):
                self._cancelled(job, uid, error)
            case OperationRecovered():
                self._recovered(event)
        for changes in batches:
            for job in changes.jobs_ended:
                self._ended(job)
            if self.tells_foreign:
                self._tell_foreign(changes, by_libvirt=isinstance(event, _BY_LIBVIRT))

    def _ended(self, job: Job) -> None:
        why = f" ({job.error})" if job.error else ""
        for device in job.devices:
            along = "" if device in job.asked else f", along with {', '.join(job.asked)}"
            self._records.write(
                names.MESSAGE_OPERATION,
                f"{job.operation} of {device}{along}: {job.state}{why}",
                device=device,
                **self._of_machine(job.machine),
                operation=job.operation,
                job=str(job.number),
                result=_result(job.error) or job.state,
                uid=str(job.started_by_uid),
            )

    def _refused(self, event: OperationRefused) -> None:
        self._records.refusal(
            event.uid,
            f"{event.operation} of {', '.join(event.devices) or event.spelt} refused ({event.error})",
            device=next(iter(event.devices), ""),
            spelt="" if event.devices else event.spelt,
            **self._of_machine(event.machine),
            operation=event.operation,
            result=_result(event.error),
        )

    def _cancelled(self, job: Job, uid: int, error: Exception | None) -> None:
        text = f"cancel of job {job.number}, the {job.operation} of {', '.join(job.asked)}"
        fields = {**self._of_machine(job.machine), "operation": "cancel", "job": str(job.number)}
        if error:
            text = f"{text} refused ({error})"
            self._records.refusal(uid, text, device=job.asked[0], **fields, result=_result(error))
            return
        for device in job.devices:
            self._records.write(names.MESSAGE_OPERATION, text, device=device, **fields, result="done", uid=str(uid))

    def _recovered(self, event: OperationRecovered) -> None:
        for device in event.devices:
            self._records.write(
                names.MESSAGE_OPERATION,
                f"{event.operation} of {device} was not finished, and what it left has been put in order",
                device=device,
                **self._of_machine(event.machine),
                operation=event.operation,
                job=str(event.number) if event.number > 0 else "",
                result="recovered",
            )

    def _tell_foreign(self, changes: Changes, *, by_libvirt: bool) -> None:
        """What became of holds without a job of ours at work on them; only what libvirt tells did others do."""
        rest = _by_others(changes) if by_libvirt else _back(changes)
        for operation, text, hold in (*self._missing(changes), *rest):
            if not self._is_ours(hold.machine, hold.device):
                name = self._state.machine_name(hold.machine)
                self._records.write(
                    names.MESSAGE_FOREIGN_CHANGE,
                    f"hold {text}: {name} and {hold.device}",
                    device=hold.device,
                    **self._of_machine(hold.machine),
                    operation=operation,
                )

    def _missing(self, changes: Changes) -> _Moves:
        for lost in changes.holds_missing:
            if all(row.ambiguous for row in lost.rows):
                why = "its claim fits more than one device now"
            elif self._state.device(lost.hold.device):
                why = "its claim finds it no longer"
            else:
                why = "its device is gone"
            yield "missing", f"missing, {why} and nobody gave it back", lost.hold

    def _of_machine(self, uuid: str) -> dict[str, str]:
        return {"machine": uuid, "machine_name": self._state.machine_name(uuid)}


def _result(error: Exception | None) -> str:
    return names.error_name(error) if error else ""


# A row of what became of a hold: in a word and in some, and the hold.
_Moves = Iterator[tuple[str, str, Hold]]


def _back(changes: Changes) -> _Moves:
    for hold in changes.holds_added:
        yield "found", "found, its device is here", hold


def _by_others(changes: Changes) -> _Moves:
    for hold in changes.holds_added:
        yield "added", "added by others", hold
    for hold in changes.holds_removed:
        yield *_gone(hold), hold
    for before, hold in changes.holds_changed:
        for word, text, half in _halves(before, hold):
            yield word, f"{text} in its {half} half", hold


def _gone(hold: Hold) -> tuple[str, str]:
    """How HOLD, or its live half, ended: in a word and in some."""
    # Releasing: a job asked the guest, and did not wait until it answered.
    return ("released", "released late") if hold.releasing else ("removed", "removed by others")


def _halves(before: Hold, after: Hold) -> Iterator[tuple[str, str, str]]:
    """What became of each half that came or went: in a word, in some, and which half."""
    if before.live != after.live:
        yield *(("added", "added by others") if after.live else _gone(before)), "live"
    if before.config != after.config:
        word = "added" if after.config else "removed"
        yield word, f"{word} by others", "stored"


class Records:
    """Writes records, of refusals a bounded number. What the journal has no room for waits; past that it is counted."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[bytes, str]] = deque()  # datagrams, each with its text for the log
        self.lost = 0  # records for which there was no room to wait
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
            journal.connect(JOURNAL)
            journal.send(data)
        except BlockingIOError:
            self._journal = journal
            self._wait(data, text)
            asyncio.get_running_loop().add_writer(journal, self.send_waiting)
            return
        except OSError:
            log.info("%s", text)
        journal.close()

    def _wait(self, data: bytes, text: str) -> None:
        if len(self.waiting) < WAITING_LIMIT:
            self.waiting.append((data, text))
        else:
            self.lost += 1

    def send_waiting(self) -> None:
        """Called when the journal has room again."""
        journal, self._journal = self._journal, None
        assert journal
        asyncio.get_running_loop().remove_writer(journal)
        journal.close()
        waiting, self.waiting = self.waiting, deque()
        for data, text in waiting:
            self._send(data, text)
        if self.lost and not self._journal:
            lost, self.lost = self.lost, 0
            self.write(names.MESSAGE_OPERATION, f"{lost} records are lost: the journal had no room for them")
