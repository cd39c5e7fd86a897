"""What dbus/org.hostpassd1.xml declares: interfaces, members, signatures, and the text that introspection serves."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from hostpassd import names

EMITS = "org.freedesktop.DBus.Property.EmitsChangedSignal"

PEER = "org.freedesktop.DBus.Peer"
INTROSPECTABLE = "org.freedesktop.DBus.Introspectable"
PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"

INSTALLED = Path("/usr/share/dbus-1/interfaces") / f"{names.BUS_NAME}.xml"
SOURCE = Path(__file__).resolve().parents[2] / "dbus" / f"{names.BUS_NAME}.xml"


@dataclasses.dataclass(frozen=True, slots=True)
class Argument:
    """One argument of a method or a signal."""

    name: str
    signature: str


@dataclasses.dataclass(frozen=True, slots=True)
class MethodSpec:
    """A method: what goes in and what comes out."""

    name: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]

    @property
    def in_signature(self) -> str:
        """The signature of a call's body."""
        return "".join(argument.signature for argument in self.inputs)

    @property
    def out_signature(self) -> str:
        """The signature of a reply's body."""
        return "".join(argument.signature for argument in self.outputs)


@dataclasses.dataclass(frozen=True, slots=True)
class SignalSpec:
    """A signal and what it carries."""

    name: str
    arguments: tuple[Argument, ...]

    @property
    def signature(self) -> str:
        """The signature of its body."""
        return "".join(argument.signature for argument in self.arguments)


@dataclasses.dataclass(frozen=True, slots=True)
class PropertySpec:
    """A property; `told`: a signal tells that it has changed. One that is const or asked for only has none."""

    name: str
    signature: str
    told: bool


@dataclasses.dataclass(frozen=True, slots=True)
class InterfaceSpec:
    """An interface by its members' names, and its introspection text without comments."""

    name: str
    methods: Mapping[str, MethodSpec]
    signals: Mapping[str, SignalSpec]
    properties: Mapping[str, PropertySpec]
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Specification:
    """All interfaces by name, in the order of the file."""

    interfaces: Mapping[str, InterfaceSpec]

    @classmethod
    def load(cls, path: Path | None = None) -> Specification:
        """Reads the file at PATH; without one that of the source tree this runs from, else the installed one.

        Raises OSError where it cannot be read, ValueError (naming it) where it declares what cannot be served.
        """
        path = path or (SOURCE if SOURCE.exists() else INSTALLED)
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> Specification:
        """Reads introspection XML. Raises ValueError where it declares what cannot be served."""
        try:
            root = ET.fromstring(text)
        except ET.ParseError as error:
            raise ValueError(f"not XML: {error}") from error
        return cls(_by_name([_interface(node) for node in root.iterfind("interface")]))


_Member = TypeVar("_Member", MethodSpec, SignalSpec, PropertySpec, InterfaceSpec)


def _interface(node: ET.Element) -> InterfaceSpec:
    return InterfaceSpec(
        name=_name(node),
        methods=_by_name([_method(child) for child in node.iterfind("method")]),
        signals=_by_name([SignalSpec(_name(child), _arguments(child, "out")) for child in node.iterfind("signal")]),
        properties=_by_name([_property(child) for child in node.iterfind("property")]),
        text=_text(node),
    )


def _method(node: ET.Element) -> MethodSpec:
    return MethodSpec(_name(node), _arguments(node, "in"), _arguments(node, "out"))


def _property(node: ET.Element) -> PropertySpec:
    name, access = _name(node), node.get("access")
    if access != "read":
        raise ValueError(f"property {name} has access {access}: only read is served")
    emits = [note.get("value") for note in node.iterfind("annotation") if note.get("name") == EMITS]
    if emits not in (["const"], ["true"], ["false"]):
        raise ValueError(f"property {name} needs one {EMITS} annotation, const, true or false")
    return PropertySpec(name, _type(node), emits == ["true"])


def _arguments(node: ET.Element, direction: str) -> tuple[Argument, ...]:
    default = "in" if node.tag == "method" else "out"
    nodes = [argument for argument in node.iterfind("arg") if argument.get("direction", default) == direction]
    return tuple(Argument(_name(argument), _type(argument)) for argument in nodes)


def _name(node: ET.Element) -> str:
    return _attribute(node, "name")


def _type(node: ET.Element) -> str:
    return _attribute(node, "type")


def _attribute(node: ET.Element, key: str) -> str:
    value = node.get(key)
    if not value:
        raise ValueError(f"<{node.tag} {node.attrib}> has no {key}")
    return value


def _by_name(members: list[_Member]) -> dict[str, _Member]:
    table = {member.name: member for member in members}
    if len(table) < len(members):
        raise ValueError(f"a name is declared twice among {sorted(member.name for member in members)}")
    return table


def _text(node: ET.Element) -> str:
    """NODE as XML, comments left out (the parser drops them) and evenly indented, one level deep."""
    ET.indent(node, level=1)
    node.tail = "\n"
    return "  " + ET.tostring(node, encoding="unicode")


# As the D-Bus Specification has them.
STANDARD = Specification.parse(f"""
<node>
  <interface name="{PEER}">
    <method name="Ping"/>
    <method name="GetMachineId">
      <arg name="machine_uuid" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{INTROSPECTABLE}">
    <method name="Introspect">
      <arg name="xml_data" type="s" direction="out"/>
    </method>
  </interface>
  <interface name="{PROPERTIES}">
    <method name="Get">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="properties" type="a{{sv}}" direction="out"/>
    </method>
    <method name="Set">
      <arg name="interface_name" type="s" direction="in"/>
      <arg name="property_name" type="s" direction="in"/>
      <arg name="value" type="v" direction="in"/>
    </method>
    <signal name="PropertiesChanged">
      <arg name="interface_name" type="s"/>
      <arg name="changed_properties" type="a{{sv}}"/>
      <arg name="invalidated_properties" type="as"/>
    </signal>
  </interface>
  <interface name="{OBJECT_MANAGER}">
    <method name="GetManagedObjects">
      <arg name="objects" type="a{{oa{{sa{{sv}}}}}}" direction="out"/>
    </method>
    <signal name="InterfacesAdded">
      <arg name="object_path" type="o"/>
      <arg name="interfaces_and_properties" type="a{{sa{{sv}}}}"/>
    </signal>
    <signal name="InterfacesRemoved">
      <arg name="object_path" type="o"/>
      <arg name="interfaces" type="as"/>
    </signal>
  </interface>
</node>
""")
