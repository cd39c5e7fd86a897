"""What events did, in batches, each of which is told at once."""

from __future__ import annotations

import dataclasses

from hostpassd.model.job import Job
from hostpassd.model.machine import Hold, Missing

# What an object on the bus stands for: ("device", name), ("machine", uuid), ("job", number) or ("manager", "").
Entity = tuple[str, str]
MANAGER: Entity = ("manager", "")

# Which row of the holds: machine (UUID), device (name), kind.
Row = tuple[str, str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """What becomes of a hold whose claims stay and stand on its device no more, as it is gone or they fit others, too.

    HOLD as it was last, ROWS that are missing.
    """

    hold: Hold
    rows: tuple[Missing, ...]


# What a row of the holds is. None: neither held nor missing.
Standing = Hold | Lost | None


@dataclasses.dataclass(slots=True)
class Changes:
    """What one or more events did. An entity is in at most one of the three."""

    added: dict[Entity, None] = dataclasses.field(default_factory=dict)
    changed: dict[Entity, None] = dataclasses.field(default_factory=dict)
    removed: dict[Entity, None] = dataclasses.field(default_factory=dict)
    holds: dict[Row, tuple[Standing, Standing]] = dataclasses.field(default_factory=dict)  # from, to
    jobs_ended: list[Job] = dataclasses.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.holds)

    @property
    def holds_added(self) -> list[Hold]:
        """The holds that came, or came back with their devices."""
        pairs = self.holds.values()
        return [after for before, after in pairs if isinstance(after, Hold) and not isinstance(before, Hold)]

    @property
    def holds_changed(self) -> list[tuple[Hold, Hold]]:
        """Of each hold that is another than before: from, to."""
        pairs = self.holds.values()
        return [(before, after) for before, after in pairs if isinstance(before, Hold) and isinstance(after, Hold)]

    @property
    def holds_missing(self) -> list[Lost]:
        """The holds whose claims stay and stand on their devices no more."""
        pairs = self.holds.values()
        return [after for before, after in pairs if isinstance(after, Lost) and not isinstance(before, Lost)]

    @property
    def holds_removed(self) -> list[Hold]:
        """The holds whose claims went, also where their devices were missing."""
        gone = (before for before, after in self.holds.values() if after is None)
        return [before.hold if isinstance(before, Lost) else before for before in gone if before is not None]

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
        for row, (before, after) in later.holds.items():
            self.stand(row, before, after)
        self.jobs_ended += later.jobs_ended

    def stand(self, row: Row, before: Standing, after: Standing) -> None:
        """Notes that ROW, which was BEFORE, is AFTER now. What is in the end as it was at first cancels out."""
        first, _ = self.holds.pop(row, (before, None))
        if first != after:
            self.holds[row] = (first, after)

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
