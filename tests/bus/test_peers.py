"""What we ask of others on the bus, and who may answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any

import pytest

from hostpassd import errors, names
from hostpassd.bus import connection, peers
from hostpassd.bus.connection import Incoming, read
from hostpassd.bus.peers import BusCallError, Match
from hostpassd.bus.router import Batch, Call, Router
from hostpassd.bus.spec import PEER
from tests.bus import fakebus, told
from tests.bus.busd import AGENT, DRIVER, PATIENCE, Client
from tests.bus.conftest import NewClient
from tests.bus.fakebus import DESTINATION, INTERFACE, MEMBER, PATH, REPLY_SERIAL, STRANGER, FakeBus

POLKIT = "org.freedesktop.PolicyKit1"
NAME_HAS_NO_OWNER = "org.freedesktop.DBus.Error.NameHasNoOwner"


@pytest.fixture
async def line(fake: FakeBus, alone: Router) -> FakeBus:
    """A bus that the test plays, with a router on it."""
    return fake


def ask(router: Router, destination: str) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(router.call(destination, "/", PEER, "GetMachineId", timeout=PATIENCE))


async def refuse(fake: FakeBus, call: Incoming, name: str, sender: str = DRIVER[0]) -> None:
    fields = {fakebus.ERROR_NAME: name, REPLY_SERIAL: call.serial}
    await fake.send(fakebus.message(fakebus.ERROR, fields, "s", ["words"], sender=sender))


async def own(fake: FakeBus, name: str, owner: str, sender: str = DRIVER[0]) -> None:
    """The bus, or SENDER, tells that NAME has another OWNER."""
    fields = {PATH: DRIVER[1], INTERFACE: DRIVER[2], MEMBER: "NameOwnerChanged"}
    await fake.send(fakebus.message(fakebus.SIGNAL, fields, "sss", [name, "", owner], sender=sender))


async def first_call(fake: FakeBus, owner: str) -> Incoming:
    """The first call to a well-known name, which OWNER has ("": nobody)."""
    watch, question, call = [await fake.take() for _ in range(3)]
    assert [watch.member, question.member] == ["AddMatch", "GetNameOwner"]
    [name] = read(question)
    assert f"arg0='{name}'" in read(watch)[0] and name == call.destination
    if owner:
        await fake.answer(question, "s", [owner])
    else:
        await refuse(fake, question, NAME_HAS_NO_OWNER)
    return call


# --- who may answer ---


async def test_nobody_but_who_was_called_can_answer(line: FakeBus, alone: Router) -> None:
    answer = ask(alone, ":1.5")
    call = await line.take()
    await line.answer(call, "s", ["forged"], STRANGER)
    await refuse(line, call, "org.example.Forged", STRANGER)
    await line.answer(call, "s", ["true"], ":1.5")
    assert await answer == ["true"]
    assert alone.counters["replies-not-wanted"] == 2


async def test_nobody_but_the_owner_of_the_name_that_was_called_can_answer(line: FakeBus, alone: Router) -> None:
    answer = ask(alone, POLKIT)
    call = await first_call(line, ":1.9")
    await line.answer(call, "s", ["forged"], STRANGER)
    await line.answer(call, "s", ["true"], ":1.9")
    assert await answer == ["true"]
    again = ask(alone, POLKIT)
    call = await line.take()  # nothing is asked twice
    await line.answer(call, "s", ["forged"], STRANGER)
    await line.answer(call, "s", ["true"], ":1.9")
    assert await again == ["true"]


async def test_who_is_started_for_the_call_can_answer(line: FakeBus, alone: Router) -> None:
    answer = ask(alone, POLKIT)
    call = await first_call(line, "")
    await own(line, POLKIT, STRANGER, sender=STRANGER)
    await line.answer(call, "s", ["forged"], STRANGER)
    await own(line, POLKIT, ":1.12")
    await line.answer(call, "s", ["true"], ":1.12")
    assert await answer == ["true"]


async def test_who_owns_the_name_later_can_answer_what_it_was_passed(line: FakeBus, alone: Router) -> None:
    first = ask(alone, POLKIT)
    call = await first_call(line, ":1.9")
    await own(line, POLKIT, "")
    await own(line, POLKIT, ":1.13")
    await line.in_step()
    second = ask(alone, POLKIT)
    later = await line.take()
    await line.answer(later, "s", ["the old one"], ":1.9")  # which the bus did not pass it
    await line.answer(later, "s", ["the new one"], ":1.13")
    await line.answer(call, "s", ["the old one"], ":1.9")
    assert (await first, await second) == (["the old one"], ["the new one"])


async def test_the_bus_itself_can_say_that_there_will_be_no_answer(line: FakeBus, alone: Router) -> None:
    answer = ask(alone, POLKIT)
    await refuse(line, await first_call(line, ""), "org.freedesktop.DBus.Error.ServiceUnknown")
    with pytest.raises(BusCallError, match="ServiceUnknown: words"):
        await answer


@pytest.mark.parametrize("body", [b"\xff" * 9, b"\1\0\0\0a\0 and more", None])
async def test_an_answer_that_cannot_be_read_is_an_error_at_once(
    line: FakeBus, alone: Router, body: bytes | None
) -> None:
    answer = ask(alone, ":1.5")
    call = await line.take()
    long: list[Any] = ["x" * (connection.READ_LIMIT + 1)]
    fields = {REPLY_SERIAL: call.serial}
    await line.send(fakebus.message(fakebus.RETURN, fields, "s", long if body is None else body, sender=":1.5"))
    with pytest.raises(BusCallError) as caught:
        await answer
    assert caught.value.name == peers.INCONSISTENT
    assert not alone.peers.asked


async def test_a_bus_that_does_not_answer_is_told_and_is_no_fault(
    line: FakeBus, alone: Router, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def rescan(_: Call) -> Sequence[Any]:
        raise AssertionError("who calls is not known")

    monkeypatch.setattr(peers, "DRIVER_TIMEOUT", 0.01)
    alone.publish(Batch(added={names.MANAGER_PATH: {names.MANAGER: told.manager()}}))
    alone.handle(names.MANAGER, "Rescan", rescan)
    await line.send(
        fakebus.message(fakebus.CALL, {PATH: names.MANAGER_PATH, INTERFACE: names.MANAGER, MEMBER: "Rescan"})
    )
    question, answer = [await line.take() for _ in range(2)]
    assert question.member == "GetConnectionUnixUser"
    assert answer.error_name == names.ERROR_PREFIX + "TimedOut"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- signals ---

Heard = list[list[Any]]


async def say(client: Client, member: str, text: str, path: str = "/say", destination: str = "") -> None:
    """A signal of CLIENT, to all who want it or to DESTINATION."""
    fields: dict[int, Any] = {PATH: path, INTERFACE: "org.example.Say", MEMBER: member}
    if destination:
        fields[fakebus.DESTINATION] = destination
    await client.send_raw(fakebus.message(fakebus.SIGNAL, fields, "s", [text], sender=""))


async def test_what_is_subscribed_to_is_heard_and_nothing_else(
    router: Router, client: Client, new_client: NewClient
) -> None:
    other, heard = await new_client(1), Heard()
    async with router.peers.subscribe(Match(client.name, "org.example.Say", "Word", "/say"), heard.append):
        await say(client, "Word", "one")
        await say(client, "Other", "-")
        await say(client, "Word", "-", path="/elsewhere")
        await say(client, "Word", "-", path="/elsewhere", destination="org.hostpassd1")
        await say(other, "Word", "-")
        await say(other, "Word", "forged", destination="org.hostpassd1")
        await say(client, "Word", "two", destination="org.hostpassd1")
        await other.call("/", PEER, "Ping")
        await client.call("/", PEER, "Ping")
        assert heard == [["one"], ["two"]]
    before = router.counters["signals-not-wanted"]
    await router.peers.ask_driver("GetId")
    await say(client, "Word", "three")
    await client.call("/", PEER, "Ping")
    assert heard == [["one"], ["two"]]
    assert router.counters["signals-not-wanted"] == before  # the bus does not send it any more


async def test_a_subscription_can_go_by_the_first_argument(router: Router, client: Client) -> None:
    heard, all_of_it = Heard(), Heard()
    match = Match(client.name, "org.example.Say", "Word")
    async with router.peers.subscribe(match, all_of_it.append):
        async with router.peers.subscribe(Match(client.name, "org.example.Say", "Word", arg0="b"), heard.append):
            for text in "abc":
                await say(client, "Word", text)
            await client.call("/", PEER, "Ping")
    assert (heard, all_of_it) == ([["b"]], [["a"], ["b"], ["c"]])


async def test_a_subscription_to_a_well_known_name_follows_its_owner(line: FakeBus, alone: Router) -> None:
    heard = Heard()
    login = "org.freedesktop.login1"

    async def prepare(sender: str, start: bool) -> None:
        fields = {PATH: "/org/freedesktop/login1", INTERFACE: login + ".Manager", MEMBER: "PrepareForSleep"}
        await line.send(fakebus.message(fakebus.SIGNAL, fields, "b", [start], sender=sender))

    async with contextlib.AsyncExitStack() as stack:
        entering = asyncio.create_task(
            stack.enter_async_context(
                alone.peers.subscribe(Match(login, login + ".Manager", "PrepareForSleep"), heard.append)
            )
        )
        _, question, subscription = [await line.take() for _ in range(3)]
        await line.answer(question, "s", [":1.7"])
        await line.answer(subscription, "", [])
        await entering
        await prepare(STRANGER, True)
        await prepare(":1.7", True)
        await own(line, login, ":1.8")
        await prepare(":1.7", True)
        await prepare(":1.8", False)
        await line.in_step()
    assert heard == [[True], [False]]


async def test_a_subscription_that_the_bus_refuses_is_an_error(line: FakeBus, alone: Router) -> None:
    async def subscribe() -> None:
        async with alone.peers.subscribe(Match(":1.5", "a.b", "C"), Heard().append):
            pass

    entering = asyncio.create_task(subscribe())
    await refuse(line, await line.take(), "org.freedesktop.DBus.Error.LimitsExceeded")
    with pytest.raises(BusCallError, match="LimitsExceeded"):
        await entering


# --- on a real bus ---


async def test_call_and_its_errors(router: Router, client: Client) -> None:
    [names_] = await router.call(*DRIVER, "ListNames")
    assert names.BUS_NAME in names_
    with pytest.raises(BusCallError) as caught:
        await router.call("org.example", "/", PEER, "Ping")
    assert caught.value.name == names.STANDARD_ERROR_PREFIX + "ServiceUnknown" and caught.value.message
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(TimeoutError):
            await router.call(client.name, "/agent", AGENT, "BeginAuthentication", timeout=0.05)
    assert not router.peers.asked


async def test_uid_of(router: Router, client: Client) -> None:
    assert await router.uid_of(client.name) == 65534
    with pytest.raises(errors.Cancelled):
        await router.uid_of(":1.999")


async def test_vanished(router: Router, client: Client, new_client: NewClient) -> None:
    other = await new_client(1)
    async with router.vanished(client.name) as gone, router.vanished(other.name) as other_gone:
        async with router.vanished(client.name) as again:
            assert not gone.is_set()
        await client.stop()
        async with asyncio.timeout(PATIENCE):
            await gone.wait()
        assert not again.is_set()
        assert not other_gone.is_set()
        async with router.vanished(client.name) as at_once:
            assert at_once.is_set()
    assert not router.peers.waiting


async def test_vanished_leaves_no_match_rule(router: Router, client: Client) -> None:
    for _ in range(600):  # the bus allows 512
        async with router.vanished(client.name):
            pass


async def test_a_stranger_cannot_tell_that_a_caller_vanished(router: Router, client: Client) -> None:
    line = router.connection
    assert line
    fields = {PATH: DRIVER[1], INTERFACE: DRIVER[2], MEMBER: "NameOwnerChanged", DESTINATION: line.unique_name}
    async with router.vanished(client.name) as gone:
        body = [client.name, client.name, ""]
        await client.send_raw(fakebus.message(fakebus.SIGNAL, fields, "sss", body, sender=""))
        await client.call("/", PEER, "Ping")
        assert not gone.is_set() and router.counters["signals-not-wanted"]
