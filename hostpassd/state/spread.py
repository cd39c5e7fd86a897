"""What the devices are used for, and what spreads upward from each: one change costs the depth of the tree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from hostpassd.model.codes import Blocker
from hostpassd.model.device import Device
from hostpassd.model.events import HostUse
from hostpassd.state import eligibility
from hostpassd.state.tree import Tree


class Spread:
    """The uses of each device, and what all below each come to.

    `_own[d]` is what USE_BLOCKERS says of each device d of the tree, as of the last `again` of d, which is due when
    something that it rests on has changed. `_below[a]` is the sum of `_own[d]`, and `_leaves[a]` the number of leaves
    (what could be assigned by itself), over all d that are below a. `uses` is of devices that are here only.
    """

    def __init__(self, tree: Tree, use_blockers: Callable[[Device], tuple[Blocker, ...]]) -> None:
        self.uses: dict[str, tuple[HostUse, ...]] = {}
        self._tree = tree
        self._use_blockers = use_blockers
        self.own: dict[str, tuple[Blocker, ...]] = {}
        self._below: dict[str, Counter[Blocker]] = {}
        self.leaves: Counter[str] = Counter()

    def below(self, name: str) -> Mapping[Blocker, int]:
        """What spreads upward from all below NAME, and from how many."""
        return self._below.get(name, {})

    def has_leaves(self, name: str) -> bool:
        """Whether anything below NAME could be assigned by itself."""
        return self.leaves[name] > 0

    def link(self, device: Device) -> None:
        """DEVICE, with what is below it, has come to lie where it does in the tree."""
        self._count_all(device, 1)

    def unlink(self, device: Device) -> None:
        """DEVICE, with what is below it, is about to leave its place in the tree."""
        self._count_all(device, -1)

    def forget(self, name: str) -> None:
        """NAME is a device no more."""
        for index in (self.own, self._below, self.uses):
            index.pop(name, None)
        del self.leaves[name]

    def again(self, name: str | None) -> None:
        """Has what NAME spreads upward be what it comes to now."""
        device = self._tree.devices.get(name or "")
        if not device:
            return
        old, new = self.own.get(device.name, ()), self._use_blockers(device)
        if old == new:
            return
        self.own[device.name] = new
        self._tree.touch(device.name)
        for ancestor in self._tree.ancestors(device.name):
            counter = self._below.setdefault(ancestor.name, Counter())
            _add(counter, old, -1)
            _add(counter, new, 1)
            self._tree.touch(ancestor.name)

    def read_uses(self, uses: Mapping[str, tuple[HostUse, ...]]) -> None:
        """USES, by device, are all that there are now."""
        new = {name: rows for name, rows in uses.items() if name in self._tree.devices}
        changed = [name for name in {**self.uses, **new} if self.uses.get(name, ()) != new.get(name, ())]
        self.uses = new
        for name in changed:
            self._tree.touch(name)
            self.again(name)

    def _count_all(self, device: Device, by: int) -> None:
        """Counts, BY times, DEVICE and all below it for all above DEVICE, and what is below it for DEVICE, too."""
        names = (device.name, *self._tree.descendants(device.name))
        above = list(self._tree.ancestors(device.name))
        for name in names:
            line = above if name == device.name else [device, *above]
            self._count(self._tree.devices[name], line, by)

    def _count(self, device: Device, line: Iterable[Device], by: int) -> None:
        """Adds what DEVICE spreads, and whether it is a leaf, to the devices of LINE, which are above it."""
        own = self.own.get(device.name, ())
        leaf = eligibility.is_leaf(device, any(d.kind == "usb" for d in self._tree.ancestors(device.name)))
        for ancestor in line:
            if own:
                _add(self._below.setdefault(ancestor.name, Counter()), own, by)
                self._tree.touch(ancestor.name)
            if leaf:
                had = self.leaves[ancestor.name] > 0
                self.leaves[ancestor.name] += by
                if had != (self.leaves[ancestor.name] > 0):
                    self._tree.touch(ancestor.name)


def _add(counter: Counter[Blocker], blockers: tuple[Blocker, ...], by: int) -> None:
    for blocker in blockers:
        counter[blocker] += by
        if not counter[blocker]:
            del counter[blocker]
