"""How often what has happened: counted in one place, from the events that go past."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hostpassd.model.events import Event, OperationRecovered, OperationRefused
from hostpassd.model.naming import SUBJECT, role
from hostpassd.state.changes import Changes
from hostpassd.state.state import State

_NAMES = (
    *("jobs-done", "jobs-failed", "jobs-cancelled", "refused", "recovered"),
    *("plugs", "unplugs", "replugs"),
)


class Counters:
    """Listens to what happens, and counts it.

    Plugs are of devices that can be the subject of an operation. `_subjects` has those that are here.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._counts = dict.fromkeys(_NAMES, 0)
        self._subjects: set[str] = set()
        self.counts_plugs = False  # set when the start is over: what was there before was not plugged in since

    def now(self) -> Mapping[str, int]:
        """How often each has happened by now."""
        return dict(self._counts)

    def notice(self, event: Event, batches: Sequence[Changes]) -> None:
        """Called for each event after the state has taken it in."""
        self._counts["refused"] += isinstance(event, OperationRefused)
        self._counts["recovered"] += isinstance(event, OperationRecovered)
        for job in (job for changes in batches for job in changes.jobs_ended):
            self._counts[f"jobs-{job.state}"] += 1
        came, gone = self._came(batches), self._gone(batches)
        self._subjects -= gone
        self._subjects |= came
        if self.counts_plugs:
            self._counts["plugs"] += len(came - gone)
            self._counts["unplugs"] += len(gone - came)
            self._counts["replugs"] += len(came & gone)

    def _came(self, batches: Sequence[Changes]) -> set[str]:
        names = {name for changes in batches for kind, name in changes.added if kind == "device"}
        devices = filter(None, map(self._state.device, names))
        return {device.name for device in devices if role(device, self._state.ancestors(device.name)) == SUBJECT}

    def _gone(self, batches: Sequence[Changes]) -> set[str]:
        names = {name for changes in batches for kind, name in changes.removed if kind == "device"}
        return names & self._subjects
