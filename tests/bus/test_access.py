"""Authorisation, with a real polkitd on a private bus."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from hostpassd import names
from hostpassd.bus import access as access_module
from hostpassd.bus.access import Access
from hostpassd.bus.router import Batch, Call, Router
from hostpassd.errors import Cancelled
from tests.bus.busd import PATIENCE, Client, Heard, Polkit, PrivateBus, Refused
from tests.bus.conftest import NewClient

DAEMON, NOBODY = 1, 65534
NOT_AUTHORIZED = "org.hostpassd1.Error.NotAuthorized"
INTERACTIVE_REQUIRED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
DETAILS = {"device.label": "Evil\x1b[2J\u202eStick" + "x" * 999, "machine.name": "guest\n1"}
BEGIN, CANCEL = "BeginAuthentication", "CancelAuthentication"

Checks = list[asyncio.Task[None]]


@pytest.fixture
async def polkit(bus: PrivateBus) -> AsyncIterator[Polkit]:
    async with Polkit(bus) as started:
        yield started


@pytest.fixture
def checks(router: Router) -> Checks:
    """Has Assign ask for the shipped action, GetMachine for the action it is given; returns the checks at work."""
    access = Access(router, log=logging.getLogger("hostpassd"))
    running: Checks = []

    async def check(call: Call, action: str) -> Sequence[Any]:
        running.append(asyncio.create_task(access.check(call, action, DETAILS)))
        await running[-1]
        return ["/ok"]

    router.publish(
        Batch(added={names.ROOT: {names.MANAGER: {"Version": "", "State": "", "Hypervisors": [], "Generation": 0}}})
    )
    router.handle(names.MANAGER, "Assign", lambda call: check(call, names.ACTION_ASSIGN))
    router.handle(names.MANAGER, "GetMachine", lambda call: check(call, call.args[0]))
    return running


def assign(client: Client, interactive: bool = False) -> asyncio.Future[Any]:
    return client.begin(names.ROOT, names.MANAGER, "Assign", "ssa{sv}", "m", "d", {}, interactive=interactive)


async def refusal(answer: asyncio.Future[Any]) -> tuple[str, str]:
    with pytest.raises(Refused) as caught:
        await asyncio.wait_for(answer, PATIENCE)
    return caught.value.name, caught.value.message


async def prompt(agent: Client) -> Heard:
    return (await agent.wait_for(BEGIN))[-1]


async def test_yes_by_a_rule_that_sees_the_details(checks: Checks, polkit: Polkit, client: Client) -> None:
    await polkit.rule(
        """
        polkit.addRule(function(action, subject) {
            if (action.id == "org.hostpassd1.assign" && subject.user == "nobody" &&
                    action.lookup("machine.name") == "guest 1") {
                return polkit.Result.YES;
            }
        });
        """
    )
    assert await assign(client) == ["/ok"]


async def test_no_by_a_rule(checks: Checks, polkit: Polkit, client: Client) -> None:
    await polkit.rule("polkit.addRule(function(action, subject) { return polkit.Result.NO; });")
    for interactive in (False, True):
        name, message = await refusal(assign(client, interactive))
        assert name == NOT_AUTHORIZED
        assert "polkit's rules" in message


async def test_root_may(checks: Checks, polkit: Polkit, new_client: NewClient) -> None:
    assert await assign(await new_client(0)) == ["/ok"]


async def test_a_challenge_without_the_flag(checks: Checks, polkit: Polkit, client: Client) -> None:
    name, message = await refusal(assign(client))
    assert name == INTERACTIVE_REQUIRED
    assert "org.hostpassd1.assign" in message


async def test_a_challenge_without_an_agent(checks: Checks, polkit: Polkit, client: Client) -> None:
    name, message = await refusal(assign(client, interactive=True))
    assert name == NOT_AUTHORIZED
    assert "agent" in message


@pytest.fixture
async def agent(polkit: Polkit, client: Client, new_client: NewClient) -> Client:
    """An agent for `client`, in a process of its own."""
    made = await new_client(NOBODY)
    await made.be_agent(client)
    return made


async def test_the_agent_says_yes(checks: Checks, polkit: Polkit, client: Client, agent: Client) -> None:
    answer = assign(client, interactive=True)
    action, message, _, _, cookie, _ = (await prompt(agent)).body
    assert action == "org.hostpassd1.assign"
    label = "Evil[2JStick" + "x" * 244
    assert message == f"Authentication is required to hand {label} to the virtual machine guest 1"
    await polkit.authenticate(NOBODY, cookie)
    await agent.answer_prompt(ok=True)
    assert await answer == ["/ok"]


async def test_the_agent_says_no(checks: Checks, polkit: Polkit, client: Client, agent: Client) -> None:
    answer = assign(client, interactive=True)
    await prompt(agent)
    await agent.answer_prompt(ok=False)
    name, message = await refusal(answer)
    assert name == NOT_AUTHORIZED
    assert "dismissed" in message


async def test_no_prompt_without_the_flag(checks: Checks, polkit: Polkit, client: Client, agent: Client) -> None:
    name, _ = await refusal(assign(client))
    assert name == INTERACTIVE_REQUIRED
    assert not [heard for heard in agent.heard if heard.member == BEGIN]


async def test_a_caller_that_vanishes_cancels_its_prompt(
    checks: Checks, polkit: Polkit, client: Client, agent: Client, router: Router
) -> None:
    assign(client, interactive=True)
    cookie = (await prompt(agent)).body[4]
    await client.stop()
    [cancelled] = await agent.wait_for(CANCEL)
    assert cancelled.body == [cookie]
    with pytest.raises(Cancelled):
        await asyncio.wait_for(checks[0], PATIENCE)
    assert not router.peers._waiting
    assert not router.peers._asked


async def test_a_cancelled_check_cancels_its_prompt(
    checks: Checks, polkit: Polkit, client: Client, agent: Client
) -> None:
    answer = assign(client, interactive=True)
    await prompt(agent)
    checks[0].cancel()
    await agent.wait_for(CANCEL)
    assert (await refusal(answer))[0] == "org.hostpassd1.Error.Cancelled"


async def test_open_prompts_do_not_hold_others_up(
    checks: Checks, polkit: Polkit, client: Client, agent: Client, new_client: NewClient
) -> None:
    for _ in range(access_module.PLACES_PER_USER):
        assign(client, interactive=True)
    await prompt(agent)
    assert (await refusal(assign(client, interactive=True)))[0] == "org.hostpassd1.Error.LimitExceeded"
    assert (await refusal(assign(client)))[0] == INTERACTIVE_REQUIRED
    other = await new_client(DAEMON)
    assert (await refusal(assign(other, interactive=True)))[0] == NOT_AUTHORIZED
    await client.stop()
    again = await new_client(client.uid)
    assert (await refusal(assign(again, interactive=True)))[0] == NOT_AUTHORIZED


async def test_one_user_has_few_prompts_however_many_connections(
    checks: Checks,
    polkit: Polkit,
    client: Client,
    agent: Client,
    new_client: NewClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(access_module, "PLACES_PER_USER", 1)
    assign(client, interactive=True)
    await prompt(agent)
    twin = await new_client(client.uid)
    name, message = await refusal(assign(twin, interactive=True))
    assert name == "org.hostpassd1.Error.LimitExceeded" and "1 prompts open" in message


async def test_who_waits_for_a_place_can_vanish(
    router: Router, polkit: Polkit, client: Client, agent: Client, new_client: NewClient
) -> None:
    """Its turn never comes, for the prompt before it stays open."""
    access = Access(router, log=logging.getLogger("hostpassd"))
    access._places[True] = asyncio.Semaphore(1)
    call = Call(client.name, "/", "", "", [], True)
    first = asyncio.create_task(access.check(call, names.ACTION_ASSIGN, DETAILS))
    await prompt(agent)
    other = await new_client(client.uid)
    second = asyncio.create_task(access.check(dataclasses.replace(call, sender=other.name), names.ACTION_ASSIGN, {}))
    await other.call("/", "org.freedesktop.DBus.Peer", "Ping")
    await other.stop()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(second, PATIENCE)
    assert access._asking == {client.uid: 1} and len(router.peers._waiting) == 1
    first.cancel()
    await agent.wait_for(CANCEL)
    await asyncio.wait({first})
    assert not access._asking and not router.peers._waiting and not router.peers._asked


async def test_more_checks_than_places(checks: Checks, polkit: Polkit, client: Client, new_client: NewClient) -> None:
    """The bus lets one connection wait for 128 answers; all of these come."""
    clients = [client, *[await new_client(uid) for uid in (NOBODY, NOBODY, DAEMON, DAEMON)]]
    answers = [assign(one) for one in clients for _ in range(32)]
    assert {(await refusal(answer))[0] for answer in answers} == {INTERACTIVE_REQUIRED}


async def test_without_polkit_only_root_may(checks: Checks, client: Client, new_client: NewClient) -> None:
    assert await assign(await new_client(0)) == ["/ok"]
    for interactive in (False, True):
        name, message = await refusal(assign(client, interactive))
        assert name == NOT_AUTHORIZED
        assert "only root" in message


async def test_a_polkit_that_restarts_is_asked_again(checks: Checks, bus: PrivateBus, client: Client) -> None:
    async with Polkit(bus):
        assert (await refusal(assign(client)))[0] == INTERACTIVE_REQUIRED
    assert (await refusal(assign(client)))[0] == NOT_AUTHORIZED
    async with Polkit(bus):
        assert (await refusal(assign(client)))[0] == INTERACTIVE_REQUIRED


async def test_a_polkit_that_dies_in_the_middle_is_a_no(
    checks: Checks, polkit: Polkit, client: Client, agent: Client
) -> None:
    answer = assign(client, interactive=True)
    await prompt(agent)
    polkit.stop()
    assert (await refusal(answer))[0] == NOT_AUTHORIZED


async def test_a_frozen_polkit_is_a_no(
    checks: Checks, polkit: Polkit, client: Client, router: Router, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "TIMEOUT", 0.2)
    polkit.freeze()
    name, message = await refusal(assign(client))
    assert name == NOT_AUTHORIZED
    assert "polkit does not answer" in message
    assert not router.peers._asked


async def test_a_prompt_may_take_longer_than_an_answer_without_one(
    checks: Checks, polkit: Polkit, client: Client, agent: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "TIMEOUT", 0.0)
    answer = assign(client, interactive=True)
    cookie = (await prompt(agent)).body[4]
    await polkit.authenticate(NOBODY, cookie)
    await agent.answer_prompt(ok=True)
    assert await answer == ["/ok"]


async def test_a_caller_of_a_frozen_polkit_can_still_vanish(checks: Checks, polkit: Polkit, client: Client) -> None:
    polkit.freeze()
    assign(client, interactive=True)
    await client.call("/", "org.freedesktop.DBus.Peer", "Ping")
    await client.stop()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(checks[0], PATIENCE)


async def test_an_action_that_polkit_does_not_know_is_a_no(
    checks: Checks, polkit: Polkit, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.begin(names.ROOT, names.MANAGER, "GetMachine", "s", "org.hostpassd1.unknown", interactive=True)
    assert (await refusal(answer))[0] == NOT_AUTHORIZED
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "org.hostpassd1.unknown" in record.getMessage()
    assert "/usr/share/polkit-1/actions/org.hostpassd1.policy" in record.getMessage()
