"""Whatever comes over the bus: it is cut into messages, and what cannot be read costs its sender an error at most."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import struct
from typing import Any

import hypothesis
import pytest
from dbus_next import MessageType, Variant
from dbus_next._private.marshaller import Marshaller
from dbus_next.aio import MessageBus
from dbus_next.signature import SignatureTree
from hypothesis import strategies as st

from hostpassd import names
from hostpassd.bus import connection
from hostpassd.bus.connection import Inbox, Incoming, OutOfStep, TooMuch, Unreadable, read
from hostpassd.bus.router import Batch, Router
from hostpassd.bus.spec import OBJECT_MANAGER
from tests.bus import fakebus
from tests.bus.busd import PATIENCE, PROJECT
from tests.bus.fakebus import CALL, INTERFACE, MEMBER, PATH, REPLY_SERIAL, SIGNAL, STRANGER, FakeBus, cut, framed

NAMED = {PATH: "/a/b", INTERFACE: "org.example.A", MEMBER: "Do"}


def one(data: bytes) -> Incoming:
    [incoming] = cut(data)
    return incoming


# --- the stream ---

VALUES = st.one_of(
    st.builds(Variant, st.just("s"), st.text("ab\u00e9", max_size=9)),
    st.builds(Variant, st.just("g"), st.sampled_from(["", "a{sv}"])),
    st.builds(Variant, st.just("t"), st.integers(0, 2**64 - 1)),
    st.builds(Variant, st.just("y"), st.integers(0, 255)),
    st.builds(Variant, st.just("a(yv)"), st.lists(st.tuples(st.just(7), st.just(Variant("d", 0.5))).map(list))),
    st.builds(Variant, st.just("(ayb)"), st.tuples(st.binary(max_size=9), st.booleans()).map(list)),
    st.builds(Variant, st.just("a{us}"), st.dictionaries(st.integers(0, 9), st.just("x"), max_size=2)),
    st.builds(Variant, st.just("v"), st.just(Variant("av", [Variant("x", -1)]))),
)
UNKNOWN_FIELDS = st.dictionaries(st.one_of(st.just(0), st.integers(9, 255)), VALUES, max_size=4)


@hypothesis.given(UNKNOWN_FIELDS, st.integers(1, 2**32 - 1), st.text("ab\u00e9", max_size=50))
def test_a_header_field_that_is_not_known_is_left_out(unknown: dict[int, Any], serial: int, text: str) -> None:
    data = fakebus.message(CALL, {**unknown, **NAMED}, "su", [text, 7], serial=serial)
    again = fakebus.message(CALL, {**NAMED, **unknown}, "su", [text, 7], serial=serial)
    for incoming in (one(data), one(again)):
        assert incoming.fault is None and incoming.serial == serial and incoming.sender == STRANGER
        assert (incoming.path, incoming.interface, incoming.member) == ("/a/b", "org.example.A", "Do")
        assert read(incoming) == [text, 7]


@hypothesis.given(st.lists(st.integers(0, 300), min_size=1, max_size=6), st.data())
def test_messages_come_in_whatever_pieces(lengths: list[int], data: st.DataObject) -> None:
    sent = [fakebus.message(SIGNAL, NAMED, "s", ["x" * length], serial=length + 1) for length in lengths]
    stream, inbox, found = b"".join(sent), Inbox(), []
    while stream:
        count = data.draw(st.integers(1, len(stream)))
        inbox.add(stream[:count])
        found += list(iter(inbox.next, None))
        stream = stream[count:]
    assert [incoming.data for incoming in found] == sent


@pytest.mark.parametrize("piece", [1, 1000, 1 << 15, 1 << 20])
def test_what_is_too_long_is_never_held_and_what_follows_is_in_step(piece: int) -> None:
    long = fakebus.message(CALL, NAMED, "s", ["x" * (connection.READ_LIMIT + 1)], serial=5)
    endless = fakebus.message(CALL, {**NAMED, PATH: "/" + "a" * connection.READ_LIMIT}, "s", ["x" * 99999], serial=6)
    stream = long + fakebus.ping(7) + endless + fakebus.ping(8)
    inbox, found, most = Inbox(), [], 0
    for at in range(0, len(stream), piece):
        inbox.add(stream[at : at + piece])
        found += list(iter(inbox.next, None))
        most = max(most, len(inbox.data))
    assert [(incoming.serial, type(incoming.fault)) for incoming in found] == [
        (5, TooMuch),
        (7, type(None)),
        (6, TooMuch),
        (8, type(None)),
    ]
    assert [incoming.sender for incoming in found] == [STRANGER, STRANGER, "", STRANGER]
    assert most <= 1024 + piece  # a header, and what came at once


def test_the_longest_message_that_is_read_is_read() -> None:
    text = "x" * (connection.READ_LIMIT - 5)
    assert read(one(fakebus.message(CALL, NAMED, "s", [text]))) == [text]
    with pytest.raises(TooMuch):
        read(one(fakebus.message(CALL, NAMED, "s", [text + "x"])))


@pytest.mark.parametrize(
    "head",
    [
        struct.pack("<cBBBIII", b"L", CALL, 0, 1, 0, 1, 0),
        struct.pack("<cBBBIII", b"l", CALL, 0, 2, 0, 1, 0),
        struct.pack("<cBBBIII", b"l", CALL, 0, 1, 0, 1, (64 << 20) + 1),
        struct.pack("<cBBBIII", b"l", CALL, 0, 1, 128 << 20, 1, 0),
        struct.pack(">cBBBIII", b"l", CALL, 0, 1, 8, 1, 8),
    ],
)
def test_what_is_no_message_is_out_of_step(head: bytes) -> None:
    with pytest.raises(OutOfStep):
        cut(head)


def test_either_byte_order_is_read() -> None:
    def field(code: int, type_: bytes, value: bytes) -> bytes:
        raw = struct.pack(">BBcxI", code, 1, type_, len(value)) + value + b"\0"
        return raw + bytes(-len(raw) % 8)

    fields = field(PATH, b"o", b"/a") + field(MEMBER, b"s", b"Do") + b"\x08\1g\0\2as\0"
    incoming = one(framed(fields, b"\0\0\0\6\0\0\0\1x\0", order=">"))
    assert (incoming.serial, incoming.path, incoming.member, incoming.signature) == (1, "/a", "Do", "as")
    assert read(incoming) == [["x"]]


# --- what cannot be read ---


@pytest.mark.parametrize("code", range(1, 9))
@pytest.mark.parametrize("value", [Variant("b", True), Variant("as", ["x"]), Variant("v", Variant("s", "x"))])
def test_a_field_of_another_type_is_a_fault_and_the_others_are_read(code: int, value: Any) -> None:
    incoming = one(fakebus.message(CALL, {**NAMED, fakebus.DESTINATION: "a.b", code: value}, sender=""))
    assert isinstance(incoming.fault, Unreadable)
    found = {PATH: incoming.path, INTERFACE: incoming.interface, MEMBER: incoming.member}
    assert all(found[key] == NAMED[key] for key in NAMED if key != code)


@pytest.mark.parametrize(
    ("kind", "fields", "missing"),
    [
        (CALL, {PATH: "/"}, "member"),
        (CALL, {MEMBER: "Do"}, "path"),
        (SIGNAL, {PATH: "/", MEMBER: "Do"}, "interface"),
        (fakebus.RETURN, {}, "reply_serial"),
        (fakebus.ERROR, {REPLY_SERIAL: 1}, "error_name"),
    ],
)
def test_a_field_that_has_to_be_there(kind: int, fields: dict[int, Any], missing: str) -> None:
    assert missing in str(one(fakebus.message(kind, fields)).fault)


@pytest.mark.parametrize("kind", [0, 5, 255])
def test_a_kind_of_message_that_is_not_known(kind: int) -> None:
    assert one(fakebus.message(kind, NAMED)).kind is None


def body_of(signature: str, data: bytes) -> Incoming:
    return one(fakebus.message(CALL, NAMED, signature, data))


@pytest.mark.parametrize(
    ("signature", "data"),
    [
        ("s", b""),
        ("s", b"\2\0\0\0a"),
        ("s", b"\1\0\0\0ax"),
        ("s", b"\3\0\0\0a\0b\0"),
        ("s", b"\1\0\0\0\xff\0"),
        ("s", b"\xff\xff\xff\xff\0"),
        ("s", b"\1\0\0\0a\0 and more"),
        ("", b"\0"),
        ("ay", b"\xff\xff\xff\x7fx"),
        ("au", b"\3\0\0\0\0\0\0"),
        ("v", b"\0\0"),
        ("v", b"\2uu\0" + bytes(8)),
        ("v", b"\1!\0"),
        ("v", b"\2()\0"),
        ("v", b"\1o\0\0\1\0\0\0x\0"),
        ("a{sv", b""),
    ],
)
def test_a_body_that_is_not_what_its_signature_says(signature: str, data: bytes) -> None:
    with pytest.raises(Unreadable):
        read(body_of(signature, data))


@pytest.mark.parametrize(
    ("signature", "data"),
    [
        ("ay", struct.pack("<I", 60_000) + bytes(60_000)),
        ("a{sv}", bytes(8)),
        ("v", b"\1h\0\0\7\0\0\0"),
        ("(yv)", b"\1\1y\0\1"),
    ],
)
def test_a_body_that_is_strange_but_right(signature: str, data: bytes) -> None:
    assert len(read(body_of(signature, data))) == 1


@pytest.mark.parametrize(
    ("signature", "piece"),
    [
        pytest.param("v", b"\1v\0", id="deep"),
        pytest.param("av", b"\1y\0\0", id="many variants"),
        pytest.param("aay", bytes(4), id="many arrays"),
        pytest.param("av", b"\xc8" + b"a" * 199 + b"y\0" + bytes(2) + bytes(4), id="long signatures"),
    ],
)
def test_much_in_little_is_too_much(signature: str, piece: bytes) -> None:
    pieces = piece * (60_000 // len(piece))
    data = pieces + b"\1y\0\0" if signature == "v" else struct.pack("<I", len(pieces)) + pieces
    with pytest.raises(TooMuch):
        read(body_of(signature, data))


def test_signatures_within_a_message_are_forgotten() -> None:
    read(body_of("av", bytes(4)))
    known = set(SignatureTree._cache)
    for number in range(1, 60):
        signature = "(" + "y" * number + ")"
        inner = bytes([len(signature)]) + signature.encode() + b"\0"
        inner += bytes(-(4 + len(inner)) % 8) + bytes(number)
        read(body_of("av", struct.pack("<I", len(inner)) + inner))
        with pytest.raises(Unreadable):
            read(body_of("av", struct.pack("<I", len(inner)) + inner[:-1]))
    assert set(SignatureTree._cache) == known


# --- anything at all ---


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A message with some of its bytes changed, but for its lengths, or with a header or body of any bytes."""
    if draw(st.booleans()):
        fields, body = draw(st.binary(max_size=60)), draw(st.binary(max_size=60))
        return framed(fields, body, kind=draw(st.integers(0, 255)), order=draw(st.sampled_from("<>")))
    data = bytearray(fakebus.message(draw(st.integers(0, 5)), NAMED, "sa{sv}", ["x", {"a": Variant("au", [1, 2])}]))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(1, len(data) - 1))
        if at not in (3, *range(4, 8), *range(12, 16)):
            data[at] = draw(st.integers(0, 255))
    return bytes(data)


@hypothesis.given(st.lists(spoilt(), min_size=1, max_size=3))
@hypothesis.settings(max_examples=500, deadline=None)
def test_nothing_that_comes_puts_out_of_step_what_follows(messages: list[bytes]) -> None:
    known = set(SignatureTree._cache)
    *found, last = cut(b"".join(messages) + fakebus.ping(77))
    assert len(found) == len(messages) and (last.serial, last.member) == (77, "Ping")
    for incoming in found:
        with contextlib.suppress(Unreadable):
            read(incoming)
    assert set(SignatureTree._cache) == known


# --- a connection ---


@pytest.fixture
def served(alone: Router) -> Router:
    """A router with one object."""
    alone.publish(Batch(added={names.ROOT: {}}))
    return alone


async def test_what_cannot_be_read_is_answered_where_it_can_be(served: Router, fake: FakeBus) -> None:
    bad_body = fakebus.message(CALL, {**NAMED, PATH: names.ROOT, INTERFACE: OBJECT_MANAGER}, serial=2)
    wrong = fakebus.message(CALL, {**NAMED, MEMBER: Variant("u", 1)}, serial=3)
    peer = {PATH: names.ROOT, INTERFACE: "org.freedesktop.DBus.Peer", MEMBER: "Ping"}
    more = fakebus.message(CALL, peer, "", b"more", serial=4)
    long = fakebus.message(CALL, peer, "s", ["x" * 99_999], serial=5)
    for data in (bad_body, wrong, more, long):
        await fake.send(data)
    errors = [await fake.take() for _ in range(4)]
    assert [(answer.reply_serial, answer.destination) for answer in errors] == [(n, STRANGER) for n in (2, 3, 4, 5)]
    assert [answer.error_name.rpartition(".")[2] for answer in errors] == [
        "UnknownMethod",
        "InvalidArgs",
        "InvalidArgs",
        "LimitExceeded",
    ]
    assert all(len(read(answer)) == 1 for answer in errors)


async def test_what_does_not_even_tell_its_sender_is_dropped(served: Router, fake: FakeBus) -> None:
    await fake.send(framed(b"\1\1"))
    await fake.send(framed(b"\xff" * 40, b"\xff" * 40))
    await fake.send(framed(b"", kind=SIGNAL) + framed(b"", kind=0) + framed(b"", kind=fakebus.RETURN))
    await fake.send(fakebus.ping(5, sender=""))
    await fake.send(fakebus.ping(6))
    assert (await fake.take()).reply_serial == 6
    assert served.counters["messages-not-known"] == 1


async def test_a_flood_of_anything_is_outlived(served: Router, fake: FakeBus) -> None:
    """Bytes of a fixed seed, so that what it finds is found again."""
    chance = random.Random(7)
    for _ in range(40):
        burst = []
        for _ in range(50):
            fields, body = chance.randbytes(chance.randrange(80)), chance.randbytes(chance.randrange(80))
            burst.append(framed(fields, body, kind=chance.randrange(6), order=chance.choice("<>")))
            spoilt = bytearray(fakebus.message(chance.randrange(5), NAMED, "s", ["x"], serial=9))
            spoilt[chance.randrange(16, len(spoilt))] = chance.randrange(256)
            burst.append(bytes(spoilt))
        await fake.send(b"".join(burst))
    await fake.in_step()
    assert not served.lost.done()


async def test_a_bus_that_is_out_of_step_is_given_up(served: Router, fake: FakeBus) -> None:
    await fake.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    await asyncio.wait_for(served.lost, PATIENCE)


async def test_a_turn_of_the_loop_reads_its_share(
    served: Router, fake: FakeBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop turns between one look at the time and the next, if time is up at each."""
    monkeypatch.setattr(connection, "SHARE", 0)
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(turn)

    turn()
    count = 20 * connection.AT_ONCE // len(one_signal := fakebus.message(SIGNAL, NAMED))
    before, handled = turns, served.counters["signals-not-wanted"]
    await fake.send(one_signal * count)
    await fake.in_step()
    assert served.counters["signals-not-wanted"] - handled == count
    assert turns - before >= 20


async def test_what_a_full_socket_does_not_take_is_sent_later_and_in_order(served: Router, fake: FakeBus) -> None:
    texts = [str(number) * 5000 for number in range(100)]
    await fake.in_step()
    fake.reads.clear()
    for text in texts:
        served.tell(":1.5", "/", "org.example.A", "Do", "s", [text])
        await asyncio.sleep(0)
    fake.reads.set()
    assert [read(await fake.take()) for _ in texts] == [[text] for text in texts]


# --- what dbus-next does not promise ---


def test_the_parts_of_the_library_that_it_does_not_promise_are_there() -> None:
    """All that connection.py leans on, so that another version fails here and with its name."""
    for name in ("_authenticate", "_auth_readline", "_message_reader", "_finalize", "wait_for_disconnect"):
        assert callable(getattr(MessageBus, name)), name
    values = connection._Values(bytes(16), 16)
    assert values.offset == 16 and callable(values.readers["v"])
    assert isinstance(SignatureTree._cache, dict) and SignatureTree._get("as").types[0].children[0].token == "s"
    assert bytes(Marshaller("y", [7]).marshall()) == b"\7"
    assert {kind.value for kind in MessageType} == {1, 2, 3, 4}


async def test_the_parts_of_a_connection_that_it_does_not_promise_are_there(served: Router) -> None:
    line = served.connection
    assert line is not None
    assert line._fd == line._sock.fileno() and not line._stream.closed


def test_no_other_module_uses_them() -> None:
    private = re.compile(r"dbus_next\._private|SignatureTree|Unmarshaller|MessageBus")
    using = [path.name for path in (PROJECT / "hostpassd").rglob("*.py") if private.search(path.read_text("utf-8"))]
    assert using == ["connection.py"]
