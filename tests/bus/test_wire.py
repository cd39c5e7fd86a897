"""Values to bytes: the library's own, byte for byte, and never such that the bus hangs up on us for them."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from typing import Any

import hypothesis
import pytest
from dbus_next import Message, MessageType
from dbus_next._private.marshaller import Marshaller
from dbus_next.signature import SignatureTree
from hypothesis import strategies as st

from hostpassd import errors, names
from hostpassd.bus import wire
from hostpassd.bus.router import Batch, Call, Router, Signal, Variant
from hostpassd.bus.spec import Specification
from tests.bus.busd import Client
from tests.bus.told import (
    DEVICE,
    ERROR,
    MANAGER,
    MANAGER_PATH,
    ONE,
    PROPERTIES,
    heard_until_generation,
    managed,
    refusal,
    said,
    strip,
)

LABELS = st.text(max_size=20).map(lambda text: text.replace("\0", ""))
OBJECT_PATHS = st.lists(st.text("abz019_", min_size=1, max_size=9), max_size=4).map(lambda parts: "/" + "/".join(parts))
VARIANTS = st.one_of(
    st.builds(Variant, st.just("s"), LABELS),
    st.builds(Variant, st.just("b"), st.booleans()),
    st.builds(Variant, st.just("t"), st.integers(0, 2**64 - 1)),
    st.builds(Variant, st.just("y"), st.integers(0, 255)),
    st.builds(Variant, st.just("ay"), st.binary(max_size=5)),
    st.builds(Variant, st.just("ad"), st.lists(st.floats(allow_nan=False), max_size=3)),
)


def values_of(type_: Any) -> st.SearchStrategy[Any]:
    """Any values of a D-Bus type."""
    simple: dict[str, st.SearchStrategy[Any]] = {
        "s": LABELS,
        "o": OBJECT_PATHS,
        "b": st.booleans(),
        "y": st.integers(0, 2**8 - 1),
        "q": st.integers(0, 2**16 - 1),
        "i": st.integers(-(2**31), 2**31 - 1),
        "u": st.integers(0, 2**32 - 1),
        "t": st.integers(0, 2**64 - 1),
        "d": st.floats(allow_nan=False),
        "v": VARIANTS,
    }
    if type_.token == "a" and type_.children[0].token == "{":
        return st.dictionaries(*(values_of(child) for child in type_.children[0].children), max_size=3)
    if type_.token == "a":
        return st.lists(values_of(type_.children[0]), max_size=3)
    if type_.token == "(":
        return st.tuples(*(values_of(child) for child in type_.children)).map(list)
    return simple[type_.token]


SPECIFICATION = Specification.load()
INTERFACES = [name for name in SPECIFICATION.interfaces if name != MANAGER]


@functools.cache
def properties_of(interface: str) -> st.SearchStrategy[dict[str, Any]]:
    declared = SPECIFICATION.interfaces[interface].properties
    return st.fixed_dictionaries({key: values_of(SignatureTree(declared[key].signature).types[0]) for key in declared})


def some_interfaces() -> st.SearchStrategy[dict[str, Any]]:
    chosen = st.lists(st.sampled_from(INTERFACES), unique=True, max_size=3)
    return chosen.flatmap(lambda found: st.fixed_dictionaries({name: properties_of(name) for name in found}))


NAMES = st.text("abz019_", min_size=1, max_size=12)


@hypothesis.given(st.dictionaries(NAMES, some_interfaces(), max_size=3), st.data())
@hypothesis.settings(max_examples=30, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_joined_parts_are_byte_for_byte_the_librarys_own(objects: dict[str, Any], data: st.DataObject) -> None:
    asyncio.run(check_bytes({names.device_path(name): found for name, found in objects.items()}, data))


async def check_bytes(objects: dict[str, dict[str, dict[str, Any]]], data: st.DataObject) -> None:
    router = Router(SPECIFICATION, log=logging.getLogger())
    router.publish(Batch(added={path: {**found} for path, found in objects.items()}))
    assert router.managed_objects() == library_bytes(objects)
    for path, interfaces in objects.items():
        for interface, values in interfaces.items():
            key = data.draw(st.sampled_from(sorted(values)))
            declared = SPECIFICATION.interfaces[interface].properties[key].signature
            values[key] = data.draw(values_of(SignatureTree(declared).types[0]))
            router.publish(Batch(changed={path: {interface: {key: values[key]}}}))
    assert router.managed_objects() == library_bytes(objects)


def library_bytes(objects: dict[str, dict[str, dict[str, Any]]]) -> bytes:
    def dress(interface: str, values: dict[str, Any]) -> dict[str, Variant]:
        declared = SPECIFICATION.interfaces[interface].properties
        return {key: Variant(declared[key].signature, values[key]) for key in declared}

    body = {path: {name: dress(name, values) for name, values in found.items()} for path, found in objects.items()}
    return bytes(Marshaller("a{oa{sa{sv}}}", [body]).marshall())


@hypothesis.given(
    path=OBJECT_PATHS,
    body=LABELS,
    destination=st.sampled_from([None, ":1.7", "org.example.Long.Name"]),
    serial=st.integers(1, 2**32 - 1),
)
def test_frames_are_byte_for_byte_the_librarys_own(path: str, body: str, destination: str, serial: int) -> None:
    signal_ = Message.new_signal(path, MANAGER, "HoldAdded", "s", [body])
    signal_.destination, signal_.serial = destination, serial
    reply = Message(message_type=MessageType.METHOD_RETURN, reply_serial=serial, serial=serial)
    error = Message(
        message_type=MessageType.ERROR,
        reply_serial=serial,
        error_name="a.b",
        destination=destination,
        signature="s",
        body=[body],
        serial=serial,
    )
    for message in (signal_, reply, error):
        ours = wire.frame(
            message.message_type,
            serial,
            path=message.path or "",
            interface=message.interface or "",
            member=message.member or "",
            error_name=message.error_name or "",
            reply_serial=message.reply_serial or 0,
            destination=message.destination or "",
            signature=message.signature,
            body=bytes(Marshaller(message.signature, message.body).marshall()),
        )
        assert ours == message._marshall()


# --- hostile strings ---


@pytest.mark.parametrize("text", ["a\0b", "a\udc80b", "\0", "a\ud800"])
async def test_unsendable_strings_do_not_cost_the_connection(
    served: Router, client: Client, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    clean = text.replace("\0", "\ufffd").replace("\udc80", "\ufffd").replace("\ud800", "\ufffd")
    await client.match()
    for number in (1, 2):
        blockers = [[ONE, text, "", {}, str(number)]]
        served.publish(
            Batch(
                changed={ONE: {DEVICE: {"Serial": text, "DeviceNodes": [text], "Blockers": blockers}}},
                signals=[Signal(MANAGER_PATH, MANAGER, "HoldAdded", [ONE, ONE, {text: Variant("as", [text])}])],
                last={MANAGER_PATH: {MANAGER: {"Generation": number}}},
            )
        )
    changed, hold, *_ = await heard_until_generation(client, 2)
    assert said(changed) == {"Serial": clean, "DeviceNodes": [clean], "Blockers": [[ONE, clean, "", {}, "1"]]}
    assert strip(hold.body[2]) == {clean: [clean]}
    assert strip(await managed(client))[ONE][DEVICE]["Serial"] == clean
    assert len([record for record in caplog.records if "NUL" in record.message]) == 1


async def test_unsendable_strings_in_replies_and_errors(served: Router, client: Client) -> None:
    async def fail(_: Call) -> Sequence[Any]:
        raise errors.NoSuchMachine("no \0 machine \udc80")

    served.handle(MANAGER, "GetMachine", fail)
    assert await refusal(client, MANAGER_PATH, MANAGER, "GetMachine", "s", "x") == (
        ERROR + "NoSuchMachine",
        "no machine",
    )


@pytest.mark.parametrize("text", ["\ufffe", "\ufdd0", "\U0010ffff", "\x01", "é"])
async def test_strange_but_sendable_strings_arrive_as_they_are(served: Router, client: Client, text: str) -> None:
    served.publish(Batch(changed={ONE: {DEVICE: {"Serial": text}}}))
    assert strip(await client.call(ONE, PROPERTIES, "Get", "ss", DEVICE, "Serial")) == [text]
