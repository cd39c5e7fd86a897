"""Plain Python values to the bytes of D-Bus, by the signatures of the specification."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dbus_next import MessageType, Variant

from hostpassd.bus.connection import marshal, types_of
from hostpassd.bus.spec import Specification

_PATH = re.compile(r"/|(/[A-Za-z0-9_]+)+")
_UNSENDABLE = re.compile("[\0\ud800-\udfff]")
_PADDING = [bytes(n) for n in (0, 7, 6, 5, 4, 3, 2, 1)]  # by length modulo 8


class Wire:
    """Plain values to bytes, with dbus-next's marshaller, by the signatures of the specification."""

    def __init__(self, specification: Specification, log: logging.Logger) -> None:
        self._spec = specification
        self._log = log
        self._warned = False

    def marshal(self, signature: str, body: Iterable[Any]) -> bytes:
        """BODY, one value per type of SIGNATURE, as bytes. Raises ValueError where a value has not its type."""
        return marshal(
            signature, [self.fit(type_, value) for type_, value in zip(types_of(signature), body, strict=True)]
        )

    def complete(self, interface: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """VALUES of all properties of INTERFACE, fit to be marshalled. Raises as fit, KeyError if one is missing."""
        unknown = set(values) - set(self._spec.interfaces[interface].properties)
        if unknown:
            raise KeyError(f"{interface} has no property {sorted(unknown)}")
        return {
            key: self.fit_property(interface, key, values[key]) for key in self._spec.interfaces[interface].properties
        }

    def fit_property(self, interface: str, key: str, value: Any) -> Any:
        """VALUE of the property KEY, fit to be marshalled. Raises as fit, KeyError if there is no such property."""
        signature = self._spec.interfaces[interface].properties[key].signature
        try:
            return self.fit(types_of(signature)[0], value)
        except Exception as error:
            error.add_note(f"{interface}.{key} {signature}: {value!a}")
            raise

    def variant(self, interface: str, key: str, value: Any) -> Any:
        """VALUE of the property KEY, fit already, as a variant. Raises ValueError if it has not its type."""
        signature = self._spec.interfaces[interface].properties[key].signature
        try:
            return Variant(signature, value)
        except ValueError as error:
            error.add_note(f"{interface}.{key} {signature}: {value!a}")
            raise

    def variants(self, interface: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """VALUES, fit already, as a{sv}. Raises as variant."""
        return {key: self.variant(interface, key, value) for key, value in values.items()}

    def entry(self, path: str, interfaces: Mapping[str, Mapping[str, Any]]) -> bytes:
        """An object's entry of a{oa{sa{sv}}}, which is at once the body of its InterfacesAdded."""
        dressed = {name: self.variants(name, values) for name, values in interfaces.items()}
        return marshal("oa{sa{sv}}", [checked_path(path), dressed])

    def fit(self, type_: Any, value: Any) -> Any:
        """VALUE as dbus-next wants it for TYPE_, and such that the bus does not hang up on us for it."""
        match type_.token:
            case "s":
                return self._sendable(value)
            case "o":
                return checked_path(value)
            case "a":
                return self._fit_array(type_.children[0], value)
            case "(":
                return [self.fit(child, item) for child, item in zip(type_.children, value, strict=True)]
            case "v":
                return Variant(value.type, self.fit(value.type, value.value))
        return value

    def _fit_array(self, child: Any, value: Any) -> Any:
        if child.token == "{":
            key_type, value_type = child.children
            return {self.fit(key_type, key): self.fit(value_type, item) for key, item in value.items()}
        if child.token == "y":
            return bytes(value)
        return [self.fit(child, item) for item in value]

    def _sendable(self, text: str) -> str:
        # A NUL makes the bus close the connection, a lone surrogate cannot be encoded; strings are cleaned where they
        # enter, so this is the last line of defence.
        if text.isascii() and "\0" not in text:
            return text
        clean = _UNSENDABLE.sub("\N{REPLACEMENT CHARACTER}", text)
        if clean != text and not self._warned:
            self._warned = True
            self._log.warning("A string with NUL or surrogates came as far as the bus: %a. Said once.", text)
        return clean


def checked_path(value: str) -> str:
    """VALUE, or ValueError if it is no object path."""
    # dbus-next lets a trailing newline pass, the bus does not.
    if not _PATH.fullmatch(value):
        raise ValueError(f"{value!a} is no object path")
    return value


def _pad(data: bytes) -> bytes:
    return _PADDING[len(data) % 8]


def join(entries: Sequence[bytes]) -> bytes:
    """The elements of an array of dictionary entries or structs, each marshalled from offset 0: they are 8-aligned."""
    parts: list[bytes] = []
    for entry in entries:
        parts += (entry, _PADDING[len(entry) % 8])
    return b"".join(parts[:-1])  # no padding after the last one


def array(entries: Sequence[bytes]) -> bytes:
    """The array of these elements, see `join`, as the first value of a body."""
    data = join(entries)
    return struct.pack("<I4x", len(data)) + data


def _string_field(code: int, type_: bytes, value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<BBcxI", code, 1, type_, len(raw)) + raw + b"\0" if raw else b""


def frame(
    kind: MessageType,
    serial: int,
    *,
    flags: int = 0,
    path: str = "",
    interface: str = "",
    member: str = "",
    error_name: str = "",
    reply_serial: int = 0,
    destination: str = "",
    signature: str = "",
    body: bytes = b"",
) -> bytes:
    """A whole message around a marshalled body; dbus-next only sends bodies that it marshals itself."""
    fields = [
        _string_field(1, b"o", path),
        _string_field(2, b"s", interface),
        _string_field(3, b"s", member),
        _string_field(4, b"s", error_name),
        struct.pack("<BBcxI", 5, 1, b"u", reply_serial) if reply_serial else b"",
        _string_field(6, b"s", destination),
        struct.pack("<BBcxB", 8, 1, b"g", len(signature)) + signature.encode() + b"\0" if signature else b"",
    ]
    array = join([field for field in fields if field])
    head = struct.pack("<cBBBIII", b"l", kind.value, flags, 1, len(body), serial, len(array))
    return b"".join((head, array, _pad(array), body))
