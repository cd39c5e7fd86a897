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
    """An operation that the last run of the daemon began and did not end."""

    operation: str
    machine: str
    steps: tuple[Step, ...]  # of the whole plan
    begun: int  # how many of them had begun, the first ones


class Journal:
    """Append-only while operations run; empty when none does. Lines: begin, step (begun), end; lend, return."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: set[int] = set()
        self.unfinished, self.lent = self._read()
        self._rewrite()

    def begin(self, number: int, plan: Plan) -> None:
        """An operation starts."""
        self._open.add(number)
        steps = [_encode(step) for step in plan.steps]
        self._append(
            {"begin": number, "operation": plan.operation, "machine": plan.machine, "steps": steps, "begun": 0}
        )

    def step(self, number: int, at: int) -> None:
        """The effect of the step AT (from 0) is about to begin."""
        self._append({"step": number, "begun": at + 1})

    def end(self, number: int) -> None:
        """An operation is over: done, or undone as far as could be."""
        self._open.discard(number)
        if self._open:
            self._append({"end": number})
        else:
            self._rewrite()

    def lend(self, device: str, uri: str, driver: str) -> None:
        """A device is taken from its host driver as a node device of the hypervisor URI."""
        self.lent[device] = (uri, driver)
        self._append({"lend": device, "uri": uri, "driver": driver})

    def give_back(self, device: str) -> None:
        """It is back with its host driver."""
        if self.lent.pop(device, None):
            self._append({"return": device})

    def recovered(self, unfinished: Unfinished) -> None:
        """What was unfinished has been finished or undone."""
        self.unfinished = tuple(u for u in self.unfinished if u is not unfinished)
        if not self._open:
            self._rewrite()

    def _read(self) -> tuple[tuple[Unfinished, ...], dict[str, tuple[str, str]]]:
        begun: dict[int, dict[str, Any]] = {}
        lent: dict[str, tuple[str, str]] = {}
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return (), {}
        for line in lines:
            try:
                _take(json.loads(line), begun, lent)
            except (ValueError, KeyError, TypeError) as error:
                # A crash can leave the last line half written: its effect had not begun.
                log.warning("the journal %s has a line that cannot be read, it is left out: %s", self._path, error)
        return tuple(_unfinished(row) for row in begun.values()), lent

    def _append(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self) -> None:
        """Leaves only what is still to be known: nothing, when nothing is unfinished or lent."""
        rows: list[dict[str, Any]] = []
        for number, left in enumerate(self.unfinished):
            steps = [_encode(step) for step in left.steps]
            row = {"operation": left.operation, "machine": left.machine, "steps": steps, "begun": left.begun}
            rows.append({"begin": -1 - number, **row})
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


def _unfinished(row: dict[str, Any]) -> Unfinished:
    return Unfinished(row["operation"], row["machine"], tuple(_decode(step) for step in row["steps"]), row["begun"])


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
