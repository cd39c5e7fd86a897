"""The objects that are told on the bus, and what a batch of changes to them comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hostpassd import names
from hostpassd.bus import spec
from hostpassd.bus.connection import marshal
from hostpassd.bus.spec import Specification
from hostpassd.bus.wire import Wire

Interfaces = dict[str, dict[str, Any] | None]
"""An object's interfaces, each with the values of its properties: plain Python of the property's signature.

None is an interface that the object has not. In a change, what is left out stays as it is.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Signal:
    """A signal of an object that is there, with its plain arguments."""

    path: str
    interface: str
    member: str
    args: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Changes that belong together, told in the order of these fields."""

    added: Mapping[str, Interfaces] = dataclasses.field(default_factory=dict)  # paths that are not there, every value
    changed: Mapping[str, Interfaces] = dataclasses.field(default_factory=dict)  # what differs is told, unless const
    signals: Sequence[Signal] = ()
    removed: Sequence[str] = ()  # one that is not there is left out
    last: Mapping[str, Interfaces] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Object:
    interfaces: dict[str, dict[str, Any]]
    entry: bytes | None = None  # {oa{sa{sv}}} of GetManagedObjects; None: to be marshalled again


class Table:
    """The objects that are there, and the tree of nodes that their paths make."""

    def __init__(self) -> None:
        self.objects: dict[str, Object] = {}
        self._children: dict[str, set[str]] = {}
        self._link(names.ROOT)

    def put(self, path: str, thing: Object) -> None:
        """THING is at PATH from now on."""
        if path not in self.objects:
            self._link(path)
        self.objects[path] = thing

    def drop(self, path: str) -> None:
        """Nothing is at PATH any more. Nodes above it that lead nowhere go too."""
        if self.objects.pop(path, None):
            self._unlink(path)

    def is_node(self, path: str) -> bool:
        """Whether PATH is an object or leads to one."""
        return path in self.objects or path in self._children or path == names.ROOT

    def children(self, path: str) -> list[str]:
        """The names of the nodes directly below PATH."""
        return sorted(self._children.get(path, ()))

    def _link(self, path: str) -> None:
        while path != "/":
            parent, name = _split(path)
            siblings = self._children.setdefault(parent, set())
            if name in siblings:
                return
            siblings.add(name)
            path = parent

    def _unlink(self, path: str) -> None:
        while not self.is_node(path):
            parent, name = _split(path)
            self._children[parent].remove(name)
            if self._children[parent]:
                return
            del self._children[parent]
            path = parent


def _split(path: str) -> tuple[str, str]:
    parent, _, name = path.rpartition("/")
    return parent or "/", name


@dataclasses.dataclass(frozen=True, slots=True)
class Telling:
    """A signal ready to be sent."""

    path: str
    interface: str
    member: str
    signature: str
    body: bytes


class Draft:
    """What a batch comes to. All of it is checked and marshalled before any of it is done.

    Before anybody can hear (HEARD is false) nothing is told, and an added object is marshalled when it is asked for:
    at the start that is half of the time.
    """

    def __init__(self, specification: Specification, table: Table, wire: Wire, heard: bool) -> None:
        self._heard = heard
        self._spec = specification
        self._table = table
        self._wire = wire
        self.objects: dict[str, Object | None] = {}
        self.tellings: list[Telling] = []

    def fill(self, batch: Batch) -> None:
        """Works BATCH out. Raises ValueError, KeyError and the like, with notes on where, if it does not fit."""
        for path, interfaces in batch.added.items():
            self._at(path, self._add, interfaces)
        for path, changes in batch.changed.items():
            self._at(path, self._change, changes)
        for signal in batch.signals:
            self._at(signal.path, self._signal, signal)
        for path in batch.removed:
            self._at(path, self._remove, None)
        for path, changes in batch.last.items():
            self._at(path, self._change, changes)

    def _at(self, path: str, step: Callable[[str, Any], None], what: Any) -> None:
        try:
            step(path, what)
        except Exception as error:
            error.add_note(f"in {step.__name__[1:]} of {path}")
            raise

    def _find(self, path: str) -> Object | None:
        return self.objects[path] if path in self.objects else self._table.objects.get(path)

    def _get(self, path: str) -> Object:
        thing = self._find(path)
        if thing is None:
            raise ValueError("there is no such object")
        return thing

    def _add(self, path: str, interfaces: Interfaces) -> None:
        if self._find(path):
            raise ValueError("it is there already")
        complete = {
            name: self._wire.complete(name, values) for name, values in interfaces.items() if values is not None
        }
        if not self._heard:
            self.objects[path] = Object(complete)
            return
        entry = self._wire.entry(path, complete)
        self.objects[path] = Object(complete, entry)
        self._tell_manager("InterfacesAdded", "oa{sa{sv}}", entry)

    def _change(self, path: str, changes: Interfaces) -> None:
        old = self._get(path)
        new = dict(old.interfaces)
        self._appear(path, new, changes)
        for name, values in changes.items():
            if values is not None and name in old.interfaces:
                new[name] = self._change_values(path, name, old.interfaces[name], values)
        self._go(path, new, [name for name, values in changes.items() if values is None and name in new])
        if any(new.get(name) is not old.interfaces.get(name) for name in new.keys() | old.interfaces.keys()):
            self.objects[path] = Object(new)

    def _appear(self, path: str, interfaces: dict[str, dict[str, Any]], changes: Interfaces) -> None:
        fresh = {name: values for name, values in changes.items() if values is not None and name not in interfaces}
        if fresh:
            complete = {name: self._wire.complete(name, values) for name, values in fresh.items()}
            interfaces.update(complete)
            self._tell_manager("InterfacesAdded", "oa{sa{sv}}", self._wire.entry(path, complete))

    def _go(self, path: str, interfaces: dict[str, dict[str, Any]], gone: list[str]) -> None:
        if gone:
            for name in gone:
                del interfaces[name]
            self._tell_manager("InterfacesRemoved", "oas", marshal("oas", [path, gone]))

    def _change_values(self, path: str, name: str, old: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        declared = self._spec.interfaces[name].properties
        fit = {key: self._wire.fit_property(name, key, value) for key, value in values.items() if value != old.get(key)}
        fresh = {key: value for key, value in fit.items() if value != old[key]}
        variants = self._wire.variants(name, fresh)
        told = {key: variant for key, variant in variants.items() if declared[key].told}
        if told:
            body = marshal("sa{sv}as", [name, told, []])
            self.tellings.append(Telling(path, spec.PROPERTIES, "PropertiesChanged", "sa{sv}as", body))
        return {**old, **fresh} if fresh else old

    def _signal(self, path: str, signal: Signal) -> None:
        if signal.interface not in self._get(path).interfaces:
            raise ValueError(f"it has no {signal.interface}")
        signature = self._spec.interfaces[signal.interface].signals[signal.member].signature
        body = self._wire.marshal(signature, signal.args)
        self.tellings.append(Telling(path, signal.interface, signal.member, signature, body))

    def _remove(self, path: str, _: None) -> None:
        thing = self._find(path)
        if thing:
            self.objects[path] = None
            self._tell_manager("InterfacesRemoved", "oas", marshal("oas", [path, list(thing.interfaces)]))

    def _tell_manager(self, member: str, signature: str, body: bytes) -> None:
        self.tellings.append(Telling(names.ROOT, spec.OBJECT_MANAGER, member, signature, body))
