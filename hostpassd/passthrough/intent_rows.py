"""The rows of the intent log, and what they mean.

A row is a JSON object. Its first key says what it tells, the value of that of which operation (a number) or of which
device. A version row says which version of hostpassd wrote the rows below it. What this version does not understand is
kept as it is, and so is all that the same operation or device has, and what stands above any version row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from hostpassd.model.machine import MachineKey
from hostpassd.passthrough.steps import STEPS, Step

VERSION = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Unfinished:
    """An operation that was begun and not ended."""

    number: int  # of the job; below 0 if an earlier run of the daemon began it
    operation: str
    machine: str  # its UUID; '' for an operation on none
    uri: str  # the machine's hypervisor; '' for none
    locks: tuple[str, ...]  # the plan's
    steps: tuple[Step, ...]  # of the whole plan
    begun: int  # how many of them had begun, the first ones
    failed: bool = False  # its caller has been, or is being, told so
    done: frozenset[int] = frozenset()  # the steps, by place, that were seen done
    undone: frozenset[int] = frozenset()  # those that were seen taken back

    @property
    def key(self) -> MachineKey | None:
        """Which machine; None: it is about none."""
        return MachineKey(self.uri, self.machine) if self.machine else None

    @property
    def devices(self) -> list[str]:
        """The devices that it moves, each once."""
        return list(dict.fromkeys(step.device for step in self.steps))


Loan = tuple[str, str]  # the hypervisor's URI and the host driver, '' if not known


# What rows of each kind have beside the number or the device.
_FIELDS: dict[str, set[str]] = {
    "begin": {"operation", "machine", "uri", "locks", "steps", "begun", "instead"},
    "step": {"begun"},
    "fail": {"begun"},
    "done": {"at"},
    "undone": {"at"},
    "end": set(),
    "lend": {"uri", "driver"},
    "return": set(),
}


@dataclasses.dataclass(slots=True)
class _Record:
    """What a file says of one operation, or of one device that is lent."""

    value: Unfinished | Loan | None = None  # None: it is not understood
    rows: list[str] = dataclasses.field(default_factory=list)


class Reading:
    """What the rows of a file come to. A version row says which version wrote those below it: a section."""

    def __init__(self) -> None:
        self.operations: list[Unfinished] = []
        self.lent: dict[str, Loan] = {}
        self.kept: list[str] = []
        self.damaged = False
        self._version: tuple[int, str] | None = None  # of this section, and the row that says so
        self._records: dict[tuple[str, int | str], _Record] = {}
        self._strange: list[str] = []

    def take(self, text: str | None) -> None:
        """Takes one row; None: a line that is none."""
        row = object_in(text) if text else None
        if text and row and "version" in row:
            self.close_section()
            self._version = row["version"], text
        elif text is None:
            self._doubt_all()
        elif self._version is None:  # the row that said so is lost
            if row is None:
                self.damaged = True
            else:
                self.kept.append(text)
        elif row is None or self._version[0] != VERSION or not self._goes_on(row, text):
            self._strange.append(text)

    def close_section(self) -> None:
        """Called after the last row of a section."""
        for (_, about), record in self._records.items():
            if record.value is None:
                self._strange += record.rows
            elif isinstance(record.value, Unfinished):
                self.operations.append(record.value)
            else:
                self.lent[str(about)] = record.value
        if self._version and self._strange:
            self.kept += [self._version[1], *self._strange]
        self._records, self._strange = {}, []

    def _doubt_all(self) -> None:
        """Distrusts every open operation: the lost row may have been its end."""
        self.damaged = True
        for (_, about), record in self._records.items():
            if isinstance(record.value, Unfinished):
                record.value = None
                record.rows.append(json.dumps({"damaged": about}))  # not to be understood at the next start either

    def _goes_on(self, row: dict[str, Any], text: str) -> bool:
        """Takes ROW into the record that it is about; whether there is one."""
        kind, about = next(iter(row.items()))
        if not isinstance(about, int | str):
            return False
        key = self._key(kind, about)
        understood = set(row) - {kind} == _FIELDS.get(kind)
        if understood and kind in ("end", "return"):
            self._records.pop(key, None)
            return True
        if kind in ("begin", "lend"):
            self._records[key] = _Record()
        record = self._records.get(key)
        if record is None:
            return False
        record.rows.append(text)
        record.value = _value(record.value, row) if understood else None
        for number in _ints(row.get("instead")):
            self._records.pop(("begin", number), None)
        return True

    def _key(self, kind: str, about: int | str) -> tuple[str, int | str]:
        """Which record a row of KIND with ABOUT is part of; of a kind that is not known: an open one."""
        first = "lend" if kind in ("lend", "return") else "begin"
        return (first, about) if kind in _FIELDS or (first, about) in self._records else ("lend", about)


def _ints(values: Any) -> list[int]:
    return [value for value in values if isinstance(value, int)] if isinstance(values, list) else []


def _value(before: Unfinished | Loan | None, row: dict[str, Any]) -> Unfinished | Loan | None:
    """What a record comes to with ROW; None where that is not understood, or was not before."""
    try:
        match row:
            case {"begin": _}:
                return _unfinished(row)
            case {"lend": _}:
                return row["uri"], row["driver"]
        return gone_on(before, row) if isinstance(before, Unfinished) else None
    except (KeyError, TypeError, ValueError):
        return None


def gone_on(operation: Unfinished, row: dict[str, Any]) -> Unfinished:
    """OPERATION after what ROW tells. ValueError: it cannot be about this operation."""
    if not 0 <= row.get("begun", 0) <= len(operation.steps) or not 0 <= row.get("at", 0) < len(operation.steps):
        raise ValueError(f"there is no such step: {row}")
    match row:
        case {"step": _, "begun": begun}:
            return dataclasses.replace(operation, begun=begun, done=operation.done | set(range(begun - 1)))
        case {"fail": _, "begun": begun}:
            return dataclasses.replace(operation, begun=begun, failed=True)
        case {"done": _, "at": at}:
            return dataclasses.replace(operation, done=operation.done | {at})
        case {"undone": _, "at": at}:
            return dataclasses.replace(operation, undone=operation.undone | {at})
    raise ValueError(f"a row of another kind: {row}")


def superseded(operation: Unfinished, devices: Collection[str]) -> Unfinished:
    """OPERATION with nothing left to be done for, or taken back from, DEVICES."""
    places = {at for at, step in enumerate(operation.steps) if step.device in devices}
    return dataclasses.replace(operation, done=operation.done | places, undone=operation.undone | places)


def is_superseded(operation: Unfinished) -> bool:
    """Whether that is so for all its devices."""
    return operation.done & operation.undone >= set(range(len(operation.steps)))


def rows_of(operation: Unfinished) -> Iterator[dict[str, Any]]:
    """The rows that come to OPERATION."""
    yield begin_row(operation)
    number = operation.number
    yield from ({"done": number, "at": at} for at in sorted(operation.done))
    yield from ({"undone": number, "at": at} for at in sorted(operation.undone))
    if operation.failed:
        yield {"fail": number, "begun": operation.begun}


def begin_row(operation: Unfinished, instead: Iterable[int] = ()) -> dict[str, Any]:
    """INSTEAD: the operations that are over with that."""
    return {
        "begin": operation.number,
        "operation": operation.operation,
        "machine": operation.machine,
        "uri": operation.uri,
        "locks": operation.locks,
        "steps": [_encode(step) for step in operation.steps],
        "begun": operation.begun,
        "instead": list(instead),
    }


def _unfinished(row: dict[str, Any]) -> Unfinished:
    return Unfinished(
        row["begin"],
        row["operation"],
        row["machine"],
        row["uri"],
        tuple(row["locks"]),
        tuple(map(_decode, row["steps"])),
        row["begun"],
    )


def _encode(step: Step) -> dict[str, str]:
    return {"step": step.code, "device": step.device} | step.fields()


def _decode(row: dict[str, str]) -> Step:
    """The step of ROW. KeyError, TypeError, ValueError: another version's, with a code or field of its own."""
    fields = dict(row)
    return STEPS[fields.pop("step")].of(fields.pop("device"), fields)


def object_in(text: str) -> dict[str, Any] | None:
    """The JSON object that TEXT is, if it is one that says something."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and row else None


def strings_in(text: str) -> set[str] | None:
    """All strings in a row, whatever it means; None where it is not JSON."""
    try:
        found = [json.loads(text)]
    except ValueError:
        return None
    for value in found:  # which grows meanwhile
        if isinstance(value, dict | list):
            found += value.values() if isinstance(value, dict) else value
    return {value for value in found if isinstance(value, str)}
