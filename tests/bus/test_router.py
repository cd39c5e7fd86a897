"""The router's rules, seen from other processes on a real bus."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import struct
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from dbus_next import MessageType
from dbus_next.signature import SignatureTree

from hostpassd import errors, names
from hostpassd.base import pieces
from hostpassd.bus import connection, spec, wire
from hostpassd.bus import router as router_module
from hostpassd.bus.connection import Incoming
from hostpassd.bus.router import Batch, BusCallError, Call, NameTaken, Router, Rows, Variant
from hostpassd.bus.spec import Specification
from tests.bus import fakebus
from tests.bus.busd import AGENT, DRIVER, PATIENCE, Client, PrivateBus
from tests.bus.conftest import NewClient
from tests.bus.fakebus import DESTINATION, INTERFACE, MEMBER, PATH, REPLY_SERIAL, FakeBus
from tests.bus.told import (
    DEVICE,
    ERROR,
    INTROSPECTABLE,
    MANAGER,
    MANAGER_PATH,
    NET,
    OBJECT_MANAGER,
    ONE,
    PEER,
    PROPERTIES,
    ROOT,
    STANDARD_ERROR,
    TWO,
    device,
    heard_until_generation,
    introspection,
    managed,
    manager,
    net,
    refusal,
    said,
    strip,
    strip_variants,
)

# --- life ---


async def test_a_taken_name_is_an_error(router: Router, bus: PrivateBus, specification: Specification) -> None:
    second = Router(specification, log=logging.getLogger())
    await second.connect(bus.address)
    with pytest.raises(NameTaken, match=r"org\.hostpassd1 is taken"):
        await second.own_name(names.BUS_NAME)
    [queued] = await second.call(*DRIVER, "ListQueuedOwners", "s", [names.BUS_NAME])
    assert len(queued) == 1
    await second.close()


async def test_a_name_that_the_policy_refuses_is_an_error(router: Router) -> None:
    with pytest.raises(NameTaken, match=r"refuses the name org\.example"):
        await router.own_name("org.example")


async def test_the_end_of_the_bus_is_told(router: Router, bus: PrivateBus) -> None:
    waiting = asyncio.create_task(router.call(*DRIVER, "GetId", timeout=None))
    async with asyncio.timeout(PATIENCE), router.vanished(":1.0") as gone:
        bus.stop()
        await gone.wait()
        await router.lost
    with contextlib.suppress(BusCallError):
        await waiting
    with pytest.raises(BusCallError, match="Disconnected"):
        await router.call(*DRIVER, "GetId", timeout=None)
    router.publish(Batch(added={ONE: {DEVICE: device()}}))


async def test_a_call_under_way_ends_with_the_bus(router: Router, bus: PrivateBus, client: Client) -> None:
    with pytest.raises(BusCallError, match="Disconnected"):
        async with asyncio.timeout(PATIENCE):
            waiting = asyncio.create_task(
                router.call(client.name, "/agent", AGENT, "BeginAuthentication", timeout=None)
            )
            await client.wait_for("BeginAuthentication")
            bus.stop()
            await waiting


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readline()
    writer.close()


async def test_a_bus_that_hangs_up_at_once_is_an_error(tmp_path: Path, specification: Specification) -> None:
    # dbus-next alone would read on for ever without giving way to the loop: only a signal gets in.
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("connect() never ended"))
    signal.alarm(PATIENCE)
    server = await asyncio.start_unix_server(hang_up, tmp_path / "socket")
    with pytest.raises(OSError):
        await Router(specification, log=logging.getLogger()).connect(f"unix:path={tmp_path / 'socket'}")
    signal.alarm(0)
    server.close()


async def test_close_sends_what_is_queued(served: Router, client: Client) -> None:
    await client.match()
    for number in range(1, 500):
        served.publish(Batch(last={MANAGER_PATH: {MANAGER: {"Generation": number}}}))
    await served.close()
    await heard_until_generation(client, 499)


async def test_a_lost_connection_leaves_no_descriptor(bus: PrivateBus, specification: Specification) -> None:
    before = os.listdir("/proc/self/fd")
    kept = [Router(specification, log=logging.getLogger()) for _ in range(3)]
    for router in kept:
        await router.connect(bus.address)
        await router.close()
    assert os.listdir("/proc/self/fd") == before


async def test_objects_published_before_the_connection_are_there(
    bus: PrivateBus, specification: Specification, client: Client
) -> None:
    early = Router(specification, log=logging.getLogger())
    early.publish(Batch(added={MANAGER_PATH: {MANAGER: manager()}, ONE: {DEVICE: device()}}))
    await early.connect(bus.address)
    await early.own_name(names.BUS_NAME)
    assert list(await managed(client)) == [ONE]
    await early.close()


async def test_a_burst_survives_a_full_socket(served: Router, client: Client) -> None:
    """dbus-next alone drops the connection when the socket is full."""
    await client.match()
    for number in range(1, 5001):
        served.publish(Batch(last={MANAGER_PATH: {MANAGER: {"Generation": number}}}))
    signals = await heard_until_generation(client, 5000)
    assert [said(heard)["Generation"] for heard in signals] == list(range(1, 5001))


# --- long answers and long calls ---


async def test_an_answer_that_the_bus_would_not_carry_is_an_error(served: Router, client: Client) -> None:
    big = "x" * (connection.MESSAGE_LIMIT // 4)
    for number in range(4):
        served.publish(Batch(added={names.device_path(f"big{number}"): {DEVICE: device(Label=big)}}))
    name, message = await refusal(client, ROOT, OBJECT_MANAGER, "GetManagedObjects")
    assert name == ERROR + "LimitExceeded"
    assert "more than the bus carries" in message
    served.publish(Batch(removed=[names.device_path(f"big{number}") for number in range(4)]))
    assert set(await managed(client)) == {ONE, TWO}


async def test_the_longest_answer_arrives(served: Router, client: Client) -> None:
    label = "x" * (router_module.BODY_LIMIT - 16)  # the variant's signature, the length, the NUL
    served.publish(Batch(changed={ONE: {DEVICE: {"Serial": "short"}}}))
    served.table.objects[ONE].interfaces[DEVICE]["Label"] = label
    [value] = await client.call(ONE, PROPERTIES, "Get", "ss", DEVICE, "Label")
    assert len(value["v"][1]) == len(label)


async def test_a_huge_call_is_refused_unread_and_costs_nothing(served: Router, client: Client) -> None:
    words = {"plan": {"v": ["as", ["x"] * 100_000]}}
    name, message = await refusal(client, MANAGER_PATH, MANAGER, "Assign", "sasa{sv}", "", [""], words)
    assert name == ERROR + "LimitExceeded" and len(message) < 200
    name, message = await refusal(client, MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, "x" * (31 << 20))
    assert name == ERROR + "LimitExceeded" and len(message) < 200
    client.begin("/" + "a" * (31 << 20), MANAGER, "Rescan", no_reply=True)
    name, message = await refusal(client, "/" + "a" * 60_000, MANAGER, "Rescan")
    assert name == STANDARD_ERROR + "UnknownObject" and message.startswith("There is no object /aaa")
    assert len(message) == router_module.TEXT_LIMIT
    assert set(await managed(client)) == {ONE, TWO}


@pytest.mark.parametrize(
    ("error", "length"),
    [(errors.NoSuchDevice, router_module.TEXT_LIMIT), (errors.Blocked, router_module.BLOCKED_LIMIT)],
)
async def test_an_error_is_cut_but_a_blocked_names_every_blocker(
    served: Router, client: Client, error: type[errors.HostpassError], length: int
) -> None:
    async def fail(call: Call) -> Sequence[Any]:
        raise error("\u00e9" * int(call.args[0]))

    served.handle(MANAGER, "GetMachine", fail)
    _, message = await refusal(client, MANAGER_PATH, MANAGER, "GetMachine", "s", str(length))
    assert message == "\u00e9" * length
    _, message = await refusal(client, MANAGER_PATH, MANAGER, "GetMachine", "s", str(length + 1))
    assert message == "\u00e9" * (length - 1) + "\N{HORIZONTAL ELLIPSIS}"


async def test_who_asks_and_does_not_read_fills_no_memory(
    served: Router, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are made only as fast as they go out, however many calls there are."""
    monkeypatch.setattr(connection, "UNSENT_LIMIT", 1 << 20)
    served.publish(Batch(changed={ONE: {DEVICE: {"Label": "x" * (1 << 20)}}}))
    line = served.connection
    assert line
    queue, most = line.queue, 0

    def spy(data: bytes) -> None:
        nonlocal most
        queue(data)
        most = max(most, line.unsent)

    monkeypatch.setattr(line, "queue", spy)
    asking = [client.begin(ONE, PROPERTIES, "Get", "ss", DEVICE, "Label") for _ in range(60)]
    answers = await asyncio.gather(*asking)
    assert [len(value["v"][1]) for [value] in answers] == [1 << 20] * 60
    assert 1 << 20 <= most < 3 << 20
    assert line.unsent == 0 and await client.call(ROOT, PEER, "Ping") == []


# --- calls ---


async def test_a_handler_sees_the_call(served: Router, client: Client) -> None:
    calls = []

    async def assign(call: Call) -> Sequence[Any]:
        calls.append(call)
        return [ONE]

    served.handle(MANAGER, "Assign", assign)
    options = {"live": {"v": ["b", True]}}
    args: list[Any] = ["m", ["d"], options]
    assert await client.call(MANAGER_PATH, MANAGER, "Assign", "sasa{sv}", *args, interactive=True) == [ONE]
    assert await client.call(MANAGER_PATH, MANAGER, "Assign", "sasa{sv}", "m", ["d"], {}) == [ONE]
    args = ["m", ["d"], {"live": Variant("b", True)}]
    assert calls[0] == Call(client.name, MANAGER_PATH, MANAGER, "Assign", args, True)
    assert not calls[1].interactive


async def test_a_call_without_an_interface(served: Router, new_client: NewClient) -> None:
    root = await new_client(0)  # the shipped policy lets only root leave the interface out

    async def rescan(_: Call) -> Sequence[Any]:
        return []

    served.handle(MANAGER, "Rescan", rescan)
    assert await root.call(MANAGER_PATH, None, "Rescan") == []
    assert await root.call(ROOT, None, "Ping") == []
    assert strip(await root.call(ONE, None, "Get", "ss", DEVICE, "Name")) == ["one"]
    assert await refusal(root, ONE, None, "Rescan") == (
        STANDARD_ERROR + "UnknownMethod",
        f"{ONE} has no method Rescan.",
    )


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        ((ONE + "x", DEVICE, "Foo"), "UnknownObject", ONE + "x"),
        ((ONE + "x", PROPERTIES, "GetAll", "s", ""), "UnknownObject", ONE + "x"),
        ((ONE + "x", INTROSPECTABLE, "Introspect"), "UnknownObject", ONE + "x"),
        (("/org/hostpass", INTROSPECTABLE, "Introspect"), "UnknownObject", "/org/hostpass"),
        ((ONE, MANAGER, "Rescan"), "UnknownInterface", MANAGER),
        ((ONE, OBJECT_MANAGER, "GetManagedObjects"), "UnknownInterface", OBJECT_MANAGER),
        (("/", OBJECT_MANAGER, "GetManagedObjects"), "UnknownInterface", OBJECT_MANAGER),
        ((names.DEVICES, PROPERTIES, "GetAll", "s", DEVICE), "UnknownInterface", DEVICE),
        ((MANAGER_PATH, MANAGER, "Explode"), "UnknownMethod", "Manager has no method Explode"),
        ((ONE, PROPERTIES, "Take", "s", "x"), "UnknownMethod", "Take"),
        ((ONE, PROPERTIES, "Get", "ss", DEVICE, "Colour"), "UnknownProperty", "Device has no property Colour"),
        ((ONE, PROPERTIES, "Get", "ss", "", "Colour"), "UnknownProperty", "Colour"),
        ((ONE, PROPERTIES, "Get", "ss", PEER, "Name"), "UnknownProperty", "Name"),
        ((ONE, PROPERTIES, "Get", "ss", NET, "Interface"), "UnknownInterface", NET),
        ((ONE, PROPERTIES, "GetAll", "s", "org.example.X"), "UnknownInterface", "org.example.X"),
        ((ONE, PROPERTIES, "Set", "ssv", DEVICE, "Name", {"v": ["s", "x"]}), "PropertyReadOnly", "Device.Name"),
        ((ONE, PROPERTIES, "Set", "ssv", DEVICE, "Colour", {"v": ["s", "x"]}), "UnknownProperty", "Colour"),
        ((ONE, PROPERTIES, "Set", "ssv", NET, "Interface", {"v": ["s", "x"]}), "UnknownInterface", NET),
        ((ONE, PROPERTIES, "Get", "s", DEVICE), "InvalidArgs", "interface_name s, property_name s; the call has s."),
        ((MANAGER_PATH, MANAGER, "Rescan", "s", "x"), "InvalidArgs", "Rescan takes nothing; the call has s."),
        ((MANAGER_PATH, MANAGER, "GetMachine"), "InvalidArgs", "GetMachine takes machine s; the call has nothing."),
        ((ROOT, PEER, "Ping", "s", "x"), "InvalidArgs", "Ping takes nothing"),
    ],
)
async def test_standard_errors(served: Router, client: Client, call: tuple[Any, ...], error: str, said: str) -> None:
    name, message = await refusal(client, *call)
    assert name == STANDARD_ERROR + error
    assert said in message
    assert message.endswith(".")


async def test_a_method_nobody_handles(served: Router, client: Client) -> None:
    name, message = await refusal(client, MANAGER_PATH, MANAGER, "Sync")
    assert (name, message) == (ERROR + "NotSupported", "This hostpassd cannot do org.hostpassd1.Manager.Sync.")


def test_a_handler_for_what_is_not_declared_is_refused(specification: Specification) -> None:
    async def make() -> None:
        Router(specification, log=logging.getLogger()).handle(MANAGER, "Explode", never)

    with pytest.raises(KeyError, match="Explode"):
        asyncio.run(make())


async def never(_: Call) -> Sequence[Any]:
    raise AssertionError("not to be called")


def error_classes() -> Iterator[type[errors.HostpassError]]:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.HostpassError):
            yield value


async def test_every_error_goes_out_under_its_name(served: Router, client: Client) -> None:
    for error in error_classes():

        async def fail(_: Call, error: Callable[[str], Exception] = error) -> Sequence[Any]:
            raise error("It is so.")

        served.handle(MANAGER, "Rescan", fail)
        prefix = STANDARD_ERROR if issubclass(error, names.STANDARD_ERRORS) else ERROR
        assert await refusal(client, MANAGER_PATH, MANAGER, "Rescan") == (prefix + error.name, "It is so.")


@pytest.mark.parametrize("answer", [None, ["not a path"], [], ["/a", "/b"], [5]])
async def test_a_fault_is_logged_and_told_in_one_sentence(
    served: Router, client: Client, caplog: pytest.LogCaptureFixture, answer: Any
) -> None:
    async def fail(_: Call) -> Sequence[Any]:
        if answer is None:
            raise RuntimeError("a secret of ours")
        return list(answer)

    served.handle(MANAGER, "GetMachine", fail)
    name, message = await refusal(client, MANAGER_PATH, MANAGER, "GetMachine", "s", "x")
    assert (name, message) == (ERROR + "Failed", router_module.FAULT)
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert record.exc_info


async def test_no_reply_where_none_is_expected(served: Router, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    done = asyncio.Event()
    send = served.send

    async def rescan(_: Call) -> Sequence[Any]:
        done.set()
        return []

    def spy(kind: MessageType, **fields: Any) -> int:  # the bus would keep an unwanted reply from the caller
        sent.append(kind)
        return send(kind, **fields)

    served.handle(MANAGER, "Rescan", rescan, quick=True)
    monkeypatch.setattr(served, "send", spy)
    for interface, member in ((MANAGER, "Rescan"), (MANAGER, "Explode"), (PEER, "Ping")):
        await client.begin(MANAGER_PATH, interface, member, no_reply=True)
    await asyncio.wait_for(done.wait(), PATIENCE)
    await client.call(ROOT, PEER, "Ping")
    assert sent == [MessageType.METHOD_RETURN]


class Waiting:
    """Has Rescan wait until it is let go."""

    def __init__(self, router: Router) -> None:
        self.go = asyncio.Event()
        self._begun = asyncio.Semaphore(0)
        router.handle(MANAGER, "Rescan", self._wait)

    async def _wait(self, _: Call) -> Sequence[Any]:
        self._begun.release()
        await self.go.wait()
        return []

    async def begun(self, count: int) -> None:
        """Returns when COUNT more calls are at work."""
        async with asyncio.timeout(PATIENCE):
            for _ in range(count):
                await self._begun.acquire()


async def test_nothing_is_built_for_who_wants_no_answer(
    served: Router, client: Client, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(message: Incoming, *_: Any) -> bytes:
        assert message.wants_reply, message
        return b""

    monkeypatch.setattr(served, "_answer_standard", build)
    root = await new_client(0)
    for one, interface in ((client, True), (root, False)):  # only root may leave the interface out
        await one.begin(ROOT, OBJECT_MANAGER if interface else None, "GetManagedObjects", no_reply=True)
        await one.begin(ROOT, INTROSPECTABLE if interface else None, "Introspect", no_reply=True)
        await one.begin(ONE, PROPERTIES if interface else None, "GetAll", "s", DEVICE, no_reply=True)
        await one.call(ROOT, PEER, "Ping")
    assert served.counters["calls-refused"] == 0
    assert served.counters["calls-without-use"] == 3  # what names its interface does not even wait


async def test_calls_under_way_when_the_bus_goes_are_no_fault(
    served: Router, bus: PrivateBus, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    begun = asyncio.Semaphore(0)

    async def wait(_: Call) -> Sequence[Any]:
        begun.release()
        return await served.call(client.name, "/agent", AGENT, "BeginAuthentication", timeout=None)

    served.handle(MANAGER, "Rescan", wait)
    for _ in range(3):
        client.begin(MANAGER_PATH, MANAGER, "Rescan")
        await begun.acquire()
    bus.stop()
    async with asyncio.timeout(PATIENCE):
        await served.lost
        while served.running:
            await asyncio.sleep(0)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def queue_of(
    served: list[Incoming], refused: list[Incoming], ready: Callable[[], bool] = lambda: True
) -> router_module.CallQueue:
    return router_module.CallQueue(served.append, refused.append, ready)


def call_of(sender: str, serial: int, size: int = 100) -> Incoming:
    return Incoming(MessageType.METHOD_CALL, 0, serial, sender=sender, data=bytes(size))


async def turn() -> None:
    """The loop goes round once."""
    await asyncio.sleep(0)


async def test_callers_have_their_turns_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "CALLS_PER_TURN", 4)
    served: list[Incoming] = []
    queue = queue_of(served, [])
    for sender, count in (("a", 6), ("b", 1), ("c", 3)):
        for serial in range(count):
            queue.put(call_of(sender, serial))
    order, seen = ["a0", "b0", "c0", "a1", "c1", "a2", "c2", "a3", "a4", "a5"], []
    for until in (4, 8, 10, 10):
        await turn()
        seen = [f"{call.sender}{call.serial}" for call in served]
        assert seen == order[:until]
    queue.put(call_of("d", 0))
    await turn()
    assert served[-1].sender == "d"


async def test_a_turn_has_a_bounded_time_for_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "SHARE", 0)
    served: list[Incoming] = []
    queue = queue_of(served, [])
    queue.put(call_of("a", 1))
    await turn()
    assert not served


async def test_who_has_more_waiting_than_its_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Incoming] = []
    refused: list[Incoming] = []
    queue = queue_of(served, refused)
    count = router_module.WAITING_PER_SENDER // (1024 + 200)
    for serial in range(count + 5):
        queue.put(call_of("a", serial))
    queue.put(call_of("b", 0))
    assert [call.serial for call in refused] == list(range(count, count + 5))
    while queue.lines:
        await turn()
    assert len(served) == count + 1 and queue.weight == 0


async def test_where_all_wait_the_newest_of_who_has_most_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "WAITING", 10 * (1024 + 200))
    served: list[Incoming] = []
    refused: list[Incoming] = []
    queue = queue_of(served, refused)
    for sender, count in (("a", 7), ("b", 3), ("c", 2), ("d", 1)):
        for serial in range(count):
            queue.put(call_of(sender, serial))
    assert [(call.sender, call.serial) for call in refused] == [("a", 6), ("a", 5), ("a", 4)]
    queue.put(call_of("e", 0, size=6000))
    assert refused[-1].sender == "e"
    while queue.lines:
        await turn()
    assert len(served) == 10 and queue.weight == 0


async def test_what_is_parked_counts_as_waiting_and_is_served_before_what_came_after_it() -> None:
    served: list[Incoming] = []
    refused: list[Incoming] = []
    queue = queue_of(served, refused)
    count = router_module.WAITING_PER_SENDER // (1024 + 200)
    for serial in range(count):
        queue.park(call_of("a", serial))
    queue.put(call_of("a", 7777))
    assert [call.serial for call in refused] == [7777]
    await turn()
    assert not served
    queue.unpark("a")
    queue.unpark("nobody")
    await turn()
    queue.put(call_of("a", 8888))
    queue.unpark("a")
    await turn()
    assert [call.serial for call in served] == [0, 1, 8888]
    while queue.parked:
        queue.unpark("a")
        await turn()
    assert len(served) == count + 1 and queue.weight == 0 and not queue.lines


async def test_where_all_wait_a_call_that_was_to_be_served_has_the_next_parked_one_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(router_module, "WAITING", 10 * (1024 + 200))
    served: list[Incoming] = []
    refused: list[Incoming] = []
    queue = queue_of(served, refused)
    queue.park(call_of("a", 0, size=3000))
    queue.park(call_of("a", 1))
    queue.unpark("a")
    queue.park(call_of("b", 0, size=1500))
    assert [(call.sender, call.serial) for call in refused] == [("a", 0)]
    await turn()
    assert [(call.sender, call.serial) for call in served] == [("a", 1)]


async def test_calls_wait_while_nothing_can_be_answered() -> None:
    served: list[Incoming] = []
    ready = False
    queue = queue_of(served, [], lambda: ready)
    queue.put(call_of("a", 1))
    await turn()
    await turn()
    assert not served and not queue.awake  # nor does the loop spin for it
    ready = True
    queue.wake()
    await turn()
    assert len(served) == 1


async def test_a_flood_of_one_keeps_no_other_from_being_served(
    fake: FakeBus, alone: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's call is answered while hundreds that came before it wait."""
    monkeypatch.setattr(connection, "SHARE", 0)
    alone.publish(Batch(added={MANAGER_PATH: {MANAGER: manager()}}))
    fields = {PATH: ROOT, INTERFACE: OBJECT_MANAGER, MEMBER: "GetManagedObjects"}
    flood = [fakebus.message(fakebus.CALL, fields, serial=serial) for serial in range(1, 1001)]
    await fake.send(b"".join(flood) + fakebus.ping(7777, sender=":1.77"))
    answers = [await fake.take() for _ in range(1001)]
    [place] = [place for place, answer in enumerate(answers) if answer.destination == ":1.77"]
    assert place < 500
    assert {answer.error_name for answer in answers} <= {"", ERROR + "LimitExceeded"}


async def test_calls_of_one_sender_are_limited(served: Router, client: Client, new_client: NewClient) -> None:
    method = Waiting(served)
    waiting = [client.begin(MANAGER_PATH, MANAGER, "Rescan") for _ in range(router_module.CALLS_PER_SENDER)]
    name, message = await refusal(client, MANAGER_PATH, MANAGER, "Rescan")
    assert name == ERROR + "LimitExceeded"
    assert "32 calls" in message
    assert await client.call(ROOT, PEER, "Ping") == []
    waiting.append((await new_client(1)).begin(MANAGER_PATH, MANAGER, "Rescan"))
    await method.begun(33)
    method.go.set()
    assert await asyncio.gather(*waiting) == [[]] * 33
    assert await client.call(MANAGER_PATH, MANAGER, "Rescan") == []
    assert not served.running and not served.waiting


async def test_calls_that_read_wait_for_their_turn_however_many_come_together(served: Router, client: Client) -> None:
    at_work: list[Call] = []
    most = 0
    go = asyncio.Event()

    async def find(call: Call) -> Sequence[Any]:
        nonlocal most
        at_work.append(call)
        most = max(most, len(at_work))
        await go.wait()
        at_work.remove(call)
        if call.args == ["bad"]:
            raise errors.InvalidArgs("no")
        return [[]]

    served.handle(MANAGER, "FindDevices", find, reads=True)
    method = Waiting(served)
    texts = [str(number) for number in range(100)]  # dbus-daemon keeps no more than 128 calls of one caller
    answers = [client.begin(MANAGER_PATH, MANAGER, "FindDevices", "s", text) for text in ["bad", *texts]]
    other = client.begin(MANAGER_PATH, MANAGER, "Rescan")
    await method.begun(1)  # what does not read does not wait for what does
    go.set()
    method.go.set()
    found = await asyncio.wait_for(asyncio.gather(*answers, other, return_exceptions=True), PATIENCE)
    assert str(found[0]) and found[1:] == [*[[[]]] * 100, []]
    assert most == router_module.READS_PER_SENDER and not served.reading and not served.running


async def test_rows_are_marshalled_in_pieces_and_come_to_the_same(
    served: Router, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "SHARE", 0)
    reasons = [[ONE, "held-live", "never", {"machine-name": Variant("s", "vm")}, "Held."]]
    rows = [[[ONE] * (number % 3), not number % 2, reasons * (number % 5), {}] for number in range(50)]
    turns, at = 0, []

    def taken() -> Iterator[Any]:
        for row in rows:
            at.append(turns)
            yield row

    async def listed(call: Call) -> Sequence[Any] | Rows:
        return [rows] if call.args[0] == "whole" else Rows(taken())

    served.handle(MANAGER, "ListCandidates", listed, reads=True)
    whole = await client.call(MANAGER_PATH, MANAGER, "ListCandidates", "sa{sv}", "whole", {})
    pieced = asyncio.ensure_future(client.begin(MANAGER_PATH, MANAGER, "ListCandidates", "sa{sv}", "pieces", {}))
    while not pieced.done():
        turns += 1
        await asyncio.sleep(0)
    assert pieced.result() == whole and len(whole[0]) == 50
    assert len(set(at)) == 50  # each in a turn of its own


async def test_calls_of_one_user_are_limited_however_many_connections(
    served: Router, client: Client, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "CALLS_PER_USER", 3)
    method = Waiting(served)
    twin, other = await new_client(client.uid), await new_client(1)
    waiting = [one.begin(MANAGER_PATH, MANAGER, "Rescan") for one in (client, client, twin)]
    await method.begun(3)
    name, message = await refusal(twin, MANAGER_PATH, MANAGER, "Rescan")
    assert name == ERROR + "LimitExceeded" and "3 calls" in message
    waiting.append(other.begin(MANAGER_PATH, MANAGER, "Rescan"))
    await method.begun(1)
    method.go.set()
    await asyncio.gather(*waiting)
    assert not served.waiting


async def test_a_quick_method_needs_no_place_and_asks_the_bus_nothing(
    served: Router, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def machine(_: Call) -> Sequence[Any]:
        return ["/m"]

    monkeypatch.setattr(router_module, "CALLS", 0)
    served.handle(MANAGER, "GetMachine", machine, quick=True)
    sent = served.serial
    assert await client.call(MANAGER_PATH, MANAGER, "GetMachine", "s", "m") == ["/m"]
    assert served.serial == sent + 1


async def test_calls_of_all_are_limited(
    served: Router, client: Client, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "CALLS", 1)
    method = Waiting(served)
    first = client.begin(MANAGER_PATH, MANAGER, "Rescan")
    await method.begun(1)
    name, message = await refusal(await new_client(1), MANAGER_PATH, MANAGER, "Rescan")
    assert name == ERROR + "LimitExceeded" and "1 calls are at work" in message
    method.go.set()
    await first


async def test_a_flood_from_one_who_leaves_leaves_nothing(
    served: Router, client: Client, new_client: NewClient
) -> None:
    """Whatever kind of call it is, and although nobody takes the answers."""
    method = Waiting(served)
    idle = len(served.tasks)
    for _ in range(200):
        client.begin(MANAGER_PATH, MANAGER, "Rescan")
        client.begin(ROOT, OBJECT_MANAGER, "GetManagedObjects")
        client.begin(ONE, PROPERTIES, "Get", "ss", DEVICE, "Colour")
        client.begin(MANAGER_PATH, MANAGER, "Sync")
    await method.begun(router_module.CALLS_PER_SENDER)
    assert len(served.tasks) <= idle + router_module.CALLS_PER_SENDER
    client.process.kill()
    await client.stop()
    method.go.set()
    await asyncio.wait_for(_until_idle(served, idle), PATIENCE)
    assert not served.running and not served.waiting and not served.peers.waiting and not served.peers.asked
    assert await (await new_client(client.uid)).call(ROOT, PEER, "Ping") == []


async def _until_idle(router: Router, tasks: int) -> None:
    while len(router.tasks) > tasks:
        await asyncio.wait(router.tasks - {asyncio.current_task()}, return_when=asyncio.FIRST_COMPLETED)


async def test_the_user_of_a_connection_is_asked_for_once(served: Router, client: Client) -> None:
    assert await served.uid_of(client.name) == client.uid
    sent = served.serial
    assert await served.uid_of(client.name) == client.uid
    assert served.serial == sent


async def test_a_cancelled_handler_is_answered(served: Router, client: Client) -> None:
    async def give_up(_: Call) -> Sequence[Any]:
        raise asyncio.CancelledError

    served.handle(MANAGER, "Rescan", give_up)
    name, _ = await refusal(client, MANAGER_PATH, MANAGER, "Rescan")
    assert name == ERROR + "Cancelled"


async def test_signatures_of_strangers_are_not_kept(served: Router, client: Client) -> None:
    """Whatever they are the signatures of: calls, values in calls, signals and answers that nobody waits for."""
    fields = {PATH: MANAGER_PATH, INTERFACE: MANAGER, DESTINATION: names.BUS_NAME}
    await refusal(client, MANAGER_PATH, MANAGER, "Assign", "sasa{sv}", "m", ["d"], {})
    fakebus.message(fakebus.RETURN, {**fields, MEMBER: "X", REPLY_SERIAL: 1}, "y", b"")
    known = set(SignatureTree._cache)
    for number in range(1, 120):
        signature = "y" * number
        options = {"x": {"v": [f"({signature})", [0] * number]}}
        await refusal(client, MANAGER_PATH, MANAGER, "Assign", "sasa{sv}", "m", ["d"], options)
        await refusal(client, MANAGER_PATH, MANAGER, "Rescan", signature, *[0] * number)
        for kind, more in ((fakebus.SIGNAL, {MEMBER: "X"}), (fakebus.RETURN, {REPLY_SERIAL: number})):
            unwanted = fakebus.message(kind, {**fields, **more}, signature, bytes(number), serial=99, sender="")
            await client.send_raw(unwanted)
    assert await client.call(ROOT, PEER, "Ping") == []
    assert set(SignatureTree._cache) == known


async def test_a_header_field_that_is_not_known_costs_nobody_anything(served: Router, client: Client) -> None:
    """dbus-broker passes them on; dbus-next takes the connection for broken."""
    fields = {PATH: "/", INTERFACE: PEER, MEMBER: "Ping", DESTINATION: names.BUS_NAME}
    for serial, value in enumerate((Variant("s", "x"), Variant("a{sv}", {"x": Variant("ay", b"x")})), start=900):
        call = fakebus.message(
            MessageType.METHOD_CALL.value, {77: value, **fields, 200: value}, serial=serial, sender=""
        )
        assert await client.call_raw(call, serial) == []
    assert await client.call(ROOT, PEER, "Ping") == []


async def test_a_message_of_unknown_type_does_not_reach_us(served: Router, client: Client) -> None:
    """dbus-next drops the connection on one; dbus-daemon passes none on."""
    called = asyncio.Event()

    async def rescan(_: Call) -> Sequence[Any]:
        called.set()
        return []

    served.handle(MANAGER, "Rescan", rescan)
    good = wire.frame(
        MessageType.METHOD_CALL, 99, path=MANAGER_PATH, interface=MANAGER, member="Rescan", destination=names.BUS_NAME
    )
    await client.send_raw(good)
    await asyncio.wait_for(called.wait(), PATIENCE)
    await client.send_raw(good[:1] + struct.pack("B", 9) + good[2:])
    assert await client.call(ROOT, PEER, "Ping") == []


# --- the standard interfaces ---


async def test_get_and_get_all(served: Router, client: Client) -> None:
    assert await client.call(ONE, PROPERTIES, "Get", "ss", DEVICE, "Driver") == [{"v": ["s", "e1000e"]}]
    assert await client.call(ONE, PROPERTIES, "Get", "ss", "", "Instance") == [{"v": ["t", 1]}]
    assert strip(await client.call(ONE, PROPERTIES, "GetAll", "s", DEVICE)) == [strip_variants(device())]
    everything = strip_variants(device(Kind="net")) | net()
    assert strip(await client.call(TWO, PROPERTIES, "GetAll", "s", "")) == [everything]
    assert await client.call(TWO, PROPERTIES, "GetAll", "s", PROPERTIES) == [{}]
    assert strip(await client.call(MANAGER_PATH, PROPERTIES, "GetAll", "s", MANAGER)) == [manager()]


async def test_a_live_value_is_as_it_is_when_it_is_asked_for(served: Router, client: Client) -> None:
    counts = {"asked": 0}

    def ask() -> dict[str, int]:
        counts["asked"] += 1
        return dict(counts)

    served.show_live(MANAGER, "Counters", ask)
    assert await client.call(MANAGER_PATH, PROPERTIES, "Get", "ss", MANAGER, "Counters") == [
        {"v": ["a{st}", {"asked": 1}]}
    ]
    [everything] = strip(await client.call(MANAGER_PATH, PROPERTIES, "GetAll", "s", MANAGER))
    assert everything == manager(Counters={"asked": 2})
    [objects] = await client.call(ROOT, OBJECT_MANAGER, "GetManagedObjects")
    assert strip(objects[MANAGER_PATH]) == {MANAGER: manager()}


async def test_peer(served: Router, client: Client) -> None:
    for path in (ROOT, "/", "/nowhere"):
        assert await client.call(path, PEER, "Ping") == []
    [machine_id] = await client.call("/", PEER, "GetMachineId")
    assert machine_id == Path("/etc/machine-id").read_text(encoding="ascii").strip()


async def test_introspection_is_the_specification(served: Router, client: Client) -> None:
    found = {node.get("name"): node for node in (await introspection(client, TWO)).iterfind("interface")}
    assert set(found) == {DEVICE, NET, PEER, INTROSPECTABLE, PROPERTIES}
    declared = {node.get("name"): node for node in ET.parse(spec.SOURCE).getroot().iterfind("interface")}
    for name in (DEVICE, NET):
        assert canonical(found[name]) == canonical(declared[name])
    assert OBJECT_MANAGER in [node.get("name") for node in (await introspection(client, ROOT)).iterfind("interface")]
    bare = [node.get("name") for node in (await introspection(client, names.DEVICES)).iterfind("interface")]
    assert bare == [PEER, INTROSPECTABLE, PROPERTIES]


def canonical(node: ET.Element) -> str:
    return ET.canonicalize(ET.tostring(node), strip_text=True)
