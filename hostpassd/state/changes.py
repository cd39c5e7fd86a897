"""What events did, in batches, each of which is told at once."""

from __future__ import annotations

import dataclasses

from hostpassd.model.job import Job
from hostpassd.model.machine import Hold

# What an object on the bus stands for: ("device", name), ("machine", uuid), ("job", number) or ("manager", "").
Entity = tuple[str, str]
MANAGER: Entity = ("manager", "")


@dataclasses.dataclass(slots=True)
class Changes:
    """What one or more events did. An entity is in at most one of the three."""

    added: dict[Entity, None] = dataclasses.field(default_factory=dict)
    changed: dict[Entity, None] = dataclasses.field(default_factory=dict)
    removed: dict[Entity, None] = dataclasses.field(default_factory=dict)
    holds_added: list[Hold] = dataclasses.field(default_factory=list)
    holds_removed: list[Hold] = dataclasses.field(default_factory=list)
    holds_changed: list[tuple[Hold, Hold]] = dataclasses.field(default_factory=list)  # a half came or went: from, to
    jobs_ended: list[Job] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.holds_added or self.holds_removed)

    def reopens(self, later: Changes) -> bool:
        """Whether LATER brings back what this removes: then they are two batches."""
        return any(entity in self.removed for entity in later.added)

    def merge(self, later: Changes) -> None:
        """Merges LATER, the changes of a later event, into this batch."""
        for entity in later.added:
            self.add(entity)
        for entity in later.changed:
            self.change(entity)
        for entity in later.removed:
            self.remove(entity)
        for hold in later.holds_removed:
            self.remove_hold(hold)
        for hold in later.holds_added:
            self.add_hold(hold)
        self.holds_changed += later.holds_changed
        self.jobs_ended += later.jobs_ended

    def add_hold(self, hold: Hold) -> None:
        """Notes that a hold came. One that was removed in the same batch cancels out: no signal."""
        if not _take_out(self.holds_removed, hold):
            self.holds_added.append(hold)

    def remove_hold(self, hold: Hold) -> None:
        """Notes that a hold went. One that was added in the same batch cancels out: nobody has heard of it."""
        if not _take_out(self.holds_added, hold):
            self.holds_removed.append(hold)

    def add(self, entity: Entity) -> None:
        """Notes that ENTITY came."""
        self.changed.pop(entity, None)
        self.added[entity] = None

    def change(self, entity: Entity) -> None:
        """Notes that something of ENTITY may be told otherwise now."""
        if entity not in self.added and entity not in self.removed:
            self.changed[entity] = None

    def remove(self, entity: Entity) -> None:
        """Notes that ENTITY went."""
        self.changed.pop(entity, None)
        if entity in self.added:
            del self.added[entity]
        else:
            self.removed[entity] = None


class Batches:
    """The changes of one event as they are made. An entity that comes where one went ends a batch."""

    def __init__(self) -> None:
        self.current = Changes()
        self._ended: list[Changes] = []

    def add(self, entity: Entity) -> None:
        """Notes that ENTITY came."""
        if entity in self.current.removed:
            self._ended.append(self.current)
            self.current = Changes()
        self.current.add(entity)

    def take(self) -> list[Changes]:
        """All batches in which something changed; the next ones begin."""
        batches, self._ended, self.current = [*self._ended, self.current], [], Changes()
        return [changes for changes in batches if changes]


def _take_out(holds: list[Hold], hold: Hold) -> bool:
    """Takes the row of HOLD (whatever is in it) out of HOLDS; whether it was there."""
    row = (hold.machine, hold.device, hold.kind)
    for known in holds:
        if (known.machine, known.device, known.kind) == row:
            holds.remove(known)
            return True
    return False
