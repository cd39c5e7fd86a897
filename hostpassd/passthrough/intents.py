"""What was begun and not finished, across a crash: a file of JSON lines, each on disk before its effect begins."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

from hostpassd.machines.domain_xml import claim_of
from hostpassd.passthrough import plan as plans
from hostpassd.passthrough.plan import Plan, Step

log = logging.getLogger(__name__)

_STEPS = {
    kind.__name__: kind
    for kind in (plans.Store, plans.Unstore, plans.Free, plans.GiveBack, plans.Attach, plans.Release)
}


@dataclasses.dataclass(frozen=True, slots=True)
class Unfinished:
    """An operation that was begun and not ended."""

    number: int  # of the job; below 0 if an earlier run of the daemon began it
    operation: str
    machine: str
    uri: str  # the machine's hypervisor
    groups: tuple[str, ...]  # the plan's
    steps: tuple[Step, ...]  # of the whole plan
    begun: int  # how many of them had begun, the first ones


class IntentLog:
    """Append-only while operations run; then rewritten. Lines: begin, step (how many have begun), end; lend, return.

    `lent`: what is owed to its host driver, by device name: the hypervisor's URI and the driver, '' if not known.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running: dict[int, Unfinished] = {}
        self._left, self.lent = self._read()
        self._rewrite()

    @property
    def unfinished(self) -> tuple[Unfinished, ...]:
        """What no job works on any more, and is still to be finished or undone."""
        return tuple(self._left.values())

    async def begin(self, number: int, plan: Plan, uri: str) -> None:
        """The job NUMBER starts on a machine of the hypervisor URI."""
        begun = Unfinished(number, plan.operation, plan.machine, uri, plan.groups, plan.steps, 0)
        self._append(_row(begun))
        self._running[number] = begun

    async def step(self, number: int, at: int) -> None:
        """The effect of the step AT (from 0) is about to begin."""
        self._running[number] = dataclasses.replace(self._running[number], begun=at + 1)
        self._append({"step": number, "begun": at + 1})

    async def leave(self, number: int, begun: int) -> None:
        """The job is over, not what it did: the first BEGUN steps are still to be undone, or the rest to be done."""
        self._left[number] = dataclasses.replace(self._running.pop(number), begun=begun)
        self._append({"step": number, "begun": begun})

    async def end(self, number: int) -> None:
        """An operation is over: done, or undone."""
        self._running.pop(number, None)
        self._left.pop(number, None)
        if self._running:
            self._append({"end": number})
        else:
            self._rewrite()

    async def lend(self, device: str, uri: str, driver: str) -> None:
        """A device is about to be taken from its host DRIVER by the hypervisor URI, or is to go back to one ('')."""
        self.lent[device] = (uri, driver)
        self._append({"lend": device, "uri": uri, "driver": driver})

    async def give_back(self, device: str) -> None:
        """It is back with its host driver."""
        if self.lent.pop(device, None):
            self._append({"return": device})

    def _read(self) -> tuple[dict[int, Unfinished], dict[str, tuple[str, str]]]:
        begun: dict[int, dict[str, Any]] = {}
        lent: dict[str, tuple[str, str]] = {}
        try:
            lines = self._path.read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return {}, {}
        for line in lines:
            try:
                _take(json.loads(line), begun, lent)
            except (ValueError, KeyError, TypeError) as error:
                # A crash can leave the last line half written: its effect had not begun.
                log.warning("the intent log %s has a line that cannot be read, it is left out: %s", self._path, error)
        # Below 0: the numbers of this run's jobs start at 1 again.
        left = (_unfinished(row | {"begin": -1 - at}) for at, row in enumerate(begun.values()))
        return {operation.number: operation for operation in left}, lent

    def _append(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self) -> None:
        """Leaves only what is still to be known: nothing, when nothing is unfinished or lent."""
        rows = [_row(left) for left in self._left.values()]
        rows += [{"lend": device, "uri": uri, "driver": driver} for device, (uri, driver) in self.lent.items()]
        temporary = self._path.with_suffix(".new")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)


def _take(row: dict[str, Any], begun: dict[int, dict[str, Any]], lent: dict[str, tuple[str, str]]) -> None:
    if "begin" in row:
        _unfinished(row)  # a row that cannot be read is left out here already
        begun[row["begin"]] = row
    elif "step" in row:
        begun[row["step"]]["begun"] = row["begun"]
    elif "end" in row:
        begun.pop(row["end"], None)
    elif "lend" in row:
        lent[row["lend"]] = (row["uri"], row["driver"])
    elif "return" in row:
        lent.pop(row["return"], None)


def _row(operation: Unfinished) -> dict[str, Any]:
    return {
        "begin": operation.number,
        "operation": operation.operation,
        "machine": operation.machine,
        "uri": operation.uri,
        "groups": operation.groups,
        "steps": [_encode(step) for step in operation.steps],
        "begun": operation.begun,
    }


def _unfinished(row: dict[str, Any]) -> Unfinished:
    return Unfinished(
        row["begin"],
        row["operation"],
        row["machine"],
        row["uri"],
        tuple(row["groups"]),
        tuple(_decode(step) for step in row["steps"]),
        row["begun"],
    )


def _encode(step: Step) -> dict[str, str]:
    row = {"kind": type(step).__name__, "device": step.device}
    match step:
        case plans.Store(_, claim) | plans.Unstore(_, claim):
            row["xml"] = claim.xml
        case plans.Attach(_, alias, xml):
            row |= {"alias": alias, "xml": xml}
        case plans.Release(_, alias):
            row["alias"] = alias
        case plans.Free(_, driver):
            row["driver"] = driver
    return row


def _decode(row: dict[str, str]) -> Step:
    fields = {name: value for name, value in row.items() if name != "kind"}
    if row["kind"] in ("Store", "Unstore"):
        return _STEPS[row["kind"]](row["device"], claim_of(row["xml"]))  # type: ignore[arg-type,call-arg]
    return _STEPS[row["kind"]](**fields)  # type: ignore[arg-type]
