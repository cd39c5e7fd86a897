"""Authorisation, with a real polkitd on a private bus."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hostpassd import names
from hostpassd.bus import access as access_module
from hostpassd.bus.access import Access
from hostpassd.bus.router import Batch, Call, Router
from hostpassd.errors import Cancelled
from hostpassd.passthrough.permission import Check
from tests.bus.busd import PATIENCE, SHIPPED_ACTIONS, Client, Heard, Polkit, PrivateBus, Refused
from tests.bus.conftest import NewClient
from tests.bus.told import manager

DAEMON, NOBODY = 1, 65534
NOT_AUTHORIZED = "org.hostpassd1.Error.NotAuthorized"
INTERACTIVE_REQUIRED = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired"
LIMIT_EXCEEDED = "org.hostpassd1.Error.LimitExceeded"
DETAILS = {
    "device.name": "usb_1_1",
    "device.label": 'Evil\x1b[2J\u202eStick" to the machine \u201cscratch\u201d' + "x" * 999,
    "machine.name": "guest\n1",
}
BEGIN, CANCEL = "BeginAuthentication", "CancelAuthentication"

Checks = list[asyncio.Task[None]]


def device(number: int, action: str = "assign", **more: str) -> Check:
    """What is asked of one of several devices."""
    own = {"device.name": f"pci_0000_0{number}_00_0", "device.label": f"Card {number}", "machine.name": "vm"}
    return action, {**own, "operation": "assign", "override": "", **more}


@pytest.fixture
async def polkit(bus: PrivateBus) -> AsyncIterator[Polkit]:
    async with Polkit(bus) as started:
        yield started


@pytest.fixture
def access(router: Router) -> Access:
    return Access(router, lambda event: None, log=logging.getLogger("hostpassd"))


@pytest.fixture
def several() -> list[Check]:
    """What Dismiss asks for; for a test to fill."""
    return []


@pytest.fixture
def checks(router: Router, access: Access, several: list[Check]) -> Checks:
    """Has Assign ask for the shipped action, GetMachine for the action it is given; returns the checks at work."""
    running: Checks = []

    async def check(call: Call, asked: Sequence[Check]) -> Sequence[Any]:
        running.append(asyncio.create_task(access.check(call, asked)))
        await running[-1]
        return ["/ok"]

    router.publish(Batch(added={names.MANAGER_PATH: {names.MANAGER: manager()}}))
    router.handle(names.MANAGER, "Assign", lambda call: check(call, [("assign", DETAILS)]))
    router.handle(names.MANAGER, "Dismiss", lambda call: check(call, several))
    router.handle(names.MANAGER, "GetMachine", lambda call: check(call, [(call.args[0], DETAILS)]))
    return running


def dismiss(client: Client, interactive: bool = True) -> asyncio.Future[Any]:
    """Asks for `several`."""
    args: list[Any] = ["m", ["d"], {}]
    return client.begin(names.MANAGER_PATH, names.MANAGER, "Dismiss", "sasa{sv}", *args, interactive=interactive)


def assign(client: Client, interactive: bool = False) -> asyncio.Future[Any]:
    args: list[Any] = ["m", ["d"], {}]
    return client.begin(names.MANAGER_PATH, names.MANAGER, "Assign", "sasa{sv}", *args, interactive=interactive)


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
                    action.lookup("machine.name") == "guest\ufffd1") {
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
    label = "Evil?[2J?Stick? to the machine ?scratch?".replace("?", "\ufffd").ljust(255, "x") + "\u2026"
    assert message == (
        'Authentication is required to hand to the virtual machine "guest\ufffd1" this device of the host: '
        f'usb_1_1, labelled "{label}"'
    )
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
    assert not router.peers.waiting
    assert not router.peers.asked


async def test_a_cancelled_check_cancels_its_prompt(
    checks: Checks, polkit: Polkit, client: Client, agent: Client
) -> None:
    answer = assign(client, interactive=True)
    await prompt(agent)
    checks[0].cancel()
    await agent.wait_for(CANCEL)
    assert (await refusal(answer))[0] == "org.hostpassd1.Error.Cancelled"


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five places for prompts: two for each person, and the last two for whoever has none."""
    monkeypatch.setattr(access_module, "PROMPTS", 5)
    monkeypatch.setattr(access_module, "PROMPTS_PER_PERSON", 2)
    monkeypatch.setattr(access_module, "PROMPTS_FOR_NEWCOMERS", 2)


NewPrompting = Callable[[int], Awaitable[tuple[Client, Client]]]


@pytest.fixture
def new_prompting(polkit: Polkit, new_client: NewClient) -> NewPrompting:
    """Makes callers with an agent that never answers."""

    async def make(uid: int) -> tuple[Client, Client]:
        caller, agent = await new_client(uid), await new_client(uid)
        await agent.be_agent(caller)
        return caller, agent

    return make


async def open_prompts(caller: Client, agent: Client, count: int) -> list[asyncio.Future[Any]]:
    answers = [assign(caller, interactive=True) for _ in range(count)]
    await agent.wait_for(BEGIN)
    return answers


YES_FOR_BIN = """
polkit.addRule(function(action, subject) { if (subject.user == "bin") { return polkit.Result.YES; } });
"""


@pytest.mark.usefixtures("few")
async def test_whoever_needs_no_prompt_waits_for_none_however_many_are_open(
    checks: Checks, polkit: Polkit, access: Access, new_client: NewClient, new_prompting: NewPrompting
) -> None:
    await polkit.rule(YES_FOR_BIN)
    for uid in (3, 4, 5, 6):
        await open_prompts(*await new_prompting(uid), 1)
    late, agent = await new_prompting(7)
    [answer] = await open_prompts(late, agent, 1)
    assert access.prompts.total() == access_module.PROMPTS
    # For a newcomer there is no place, and it is told so at once; and whoever needs none is answered as ever.
    assert (await refusal(assign(await new_client(8), interactive=True)))[0] == LIMIT_EXCEEDED
    allowed = await new_client(2)
    for interactive in (False, True):
        assert await asyncio.wait_for(assign(allowed, interactive), PATIENCE) == ["/ok"]
        assert (await refusal(assign(await new_client(9), interactive=False)))[0] == INTERACTIVE_REQUIRED
    await agent.answer_prompt(ok=False)
    assert (await refusal(answer))[0] == NOT_AUTHORIZED
    assert (await refusal(assign(await new_client(8), interactive=True)))[0] == NOT_AUTHORIZED  # it has no agent


@pytest.mark.usefixtures("few")
async def test_nobody_has_many_prompts_and_the_last_places_are_for_whoever_has_none(
    checks: Checks, access: Access, new_client: NewClient, new_prompting: NewPrompting
) -> None:
    first, agent = await new_prompting(3)
    await open_prompts(first, agent, 2)
    for caller in (first, await new_client(3)):  # however many connections
        name, message = await refusal(assign(caller, interactive=True))
        assert name == LIMIT_EXCEEDED and "You have 2 prompts open" in message
    second = await new_prompting(4)
    await open_prompts(*second, 1)
    assert access.prompts == {"user 3": 2, "user 4": 1}
    assert (await refusal(assign(second[0], interactive=True)))[0] == LIMIT_EXCEEDED
    await open_prompts(*await new_prompting(5), 1)
    assert access.prompts.total() == 4
    await first.stop()
    await agent.wait_for(CANCEL, 2)
    while access.prompts["user 3"]:
        await asyncio.sleep(0)
    await open_prompts(*await new_prompting(3), 1)
    assert access.prompts == {"user 3": 1, "user 4": 1, "user 5": 1}


@pytest.mark.usefixtures("few")
async def test_a_range_of_user_ids_is_one_person(
    checks: Checks,
    access: Access,
    new_client: NewClient,
    new_prompting: NewPrompting,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or one person with 65,536 of them has all the places."""
    ranges = tmp_path / "subuid"
    ranges.write_text("nonsense\n\nbob:x:y\nalice:3:2\nbob:5:1\n", encoding="utf-8")
    monkeypatch.setattr(access_module, "SUBUIDS", ranges)
    for uid in (3, 4):
        await open_prompts(*await new_prompting(uid), 1)
    assert access.prompts == {"range of alice": 2}
    assert (await refusal(assign(await new_client(4), interactive=True)))[0] == LIMIT_EXCEEDED
    await open_prompts(*await new_prompting(5), 1)
    assert access.prompts == {"range of alice": 2, "range of bob": 1}


async def test_a_prompt_that_nobody_answers_ends(
    checks: Checks, access: Access, client: Client, agent: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_module, "PROMPT_TIMEOUT", 0.2)
    answer = assign(client, interactive=True)
    cookie = (await prompt(agent)).body[4]
    name, message = await refusal(answer)
    assert name == NOT_AUTHORIZED and "Nobody answered" in message
    [cancelled] = await agent.wait_for(CANCEL)
    assert cancelled.body == [cookie] and not access.prompts


async def test_what_one_prompt_says_of_many_devices_is_bounded(
    checks: Checks, several: list[Check], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Mapping[str, str]] = []

    async def ask(_: Access, call: Call, action: str, details: Mapping[str, str], *, interactive: bool) -> Any:
        told.extend([details] if interactive else [])
        return interactive, True, {}

    monkeypatch.setattr(Access, "ask", ask)
    several += [device(1, **{"device.companions": f"pci_{number}_" * 100}) for number in range(64)]
    assert await asyncio.wait_for(dismiss(client), PATIENCE) == ["/ok"]
    [details] = told
    assert max(map(len, details.values())) == len(details["device.companions"]) == access_module.DETAIL_LIMIT


async def test_several_devices_are_asked_for_in_one_prompt(
    checks: Checks, several: list[Check], polkit: Polkit, client: Client, agent: Client
) -> None:
    several += [device(1), device(2, **{"device.label": "Card; 2"}), device(3)]
    await polkit.rule(
        """
        polkit.addRule(function(action, subject) {
            if (action.lookup("device.name") == "pci_0000_03_00_0") { return polkit.Result.YES; }
        });
        """
    )
    answer = dismiss(client)
    _, message, _, _, cookie, _ = (await prompt(agent)).body
    assert message.endswith(
        '"vm" this device of the host: pci_0000_01_00_0 pci_0000_02_00_0, labelled "Card 1; Card; 2"'
    )
    await polkit.authenticate(NOBODY, cookie)
    await agent.answer_prompt(ok=True)
    assert await answer == ["/ok"]
    assert len([heard for heard in agent.heard if heard.member == BEGIN]) == 1


async def test_each_action_has_a_prompt(
    checks: Checks, several: list[Check], polkit: Polkit, client: Client, agent: Client
) -> None:
    several += [device(1), device(2, "assign-override", override="mounted"), device(3)]
    answer = dismiss(client)
    for count in (1, 2):
        asked = (await agent.wait_for(BEGIN, count))[-1].body
        await polkit.authenticate(NOBODY, asked[4])
        await agent.answer_prompt(ok=True)
    assert await answer == ["/ok"]
    first, second = [heard.body for heard in agent.heard if heard.member == BEGIN]
    assert (first[0], second[0]) == (names.action_id("assign"), names.action_id("assign-override"))
    assert "pci_0000_01_00_0 pci_0000_03_00_0" in first[1]
    assert second[1].endswith('"vm", in spite of mounted, this device of the host: pci_0000_02_00_0, labelled "Card 2"')


@pytest.mark.parametrize("denied", [1, 2, 3])
async def test_a_no_for_one_device_is_a_no_for_all_and_nobody_is_prompted(
    checks: Checks, several: list[Check], access: Access, polkit: Polkit, client: Client, agent: Client, denied: int
) -> None:
    several += [device(1), device(2), device(3)]
    await polkit.rule(
        f"""
        polkit.addRule(function(action, subject) {{
            if (action.lookup("device.name") == "pci_0000_0{denied}_00_0") {{ return polkit.Result.NO; }}
        }});
        """
    )
    for interactive in (False, True):
        name, message = await refusal(dismiss(client, interactive))
        assert name == NOT_AUTHORIZED and "polkit's rules" in message
    assert not [heard for heard in agent.heard if heard.member == BEGIN]
    assert await access.would(Call(client.name, "/", "", "", [], True), several) == "no"
    assert await access.would(Call(client.name, "/", "", "", [], True), several[:1] * 2) in ("no", "challenge")


async def test_a_name_with_signs_that_nobody_sees_is_another_name_for_a_rule(
    checks: Checks, several: list[Check], polkit: Polkit, client: Client
) -> None:
    await polkit.rule(
        """
        polkit.addRule(function(action, subject) {
            if (action.lookup("machine.name") == "scratch") { return polkit.Result.YES; }
        });
        """
    )
    for name in ("scratch\u202e", "scratch\x9b", 'scr"atch', "scratch ", "scratch\u200b", "scratch\n"):
        several[:] = [device(1, **{"machine.name": name})]
        assert (await refusal(dismiss(client, interactive=False)))[0] == INTERACTIVE_REQUIRED, name
    several[:] = [device(1, **{"machine.name": "scratch"})]
    assert await dismiss(client, interactive=False) == ["/ok"]


def test_every_sentence_of_the_policy_tells_the_machine_first_and_what_a_device_calls_itself_last() -> None:
    messages = re.findall("<message>(.*)</message>", SHIPPED_ACTIONS.read_text(encoding="utf-8"))
    assert len(messages) == 4
    for message in messages:
        before, machine, rest = message.partition('"$(machine.name)"')
        assert machine and "$(" not in before
        assert rest.endswith(' this device of the host: $(device.name), labelled "$(device.label)"')
        assert rest.count("$(") <= 3 and message.count('"') == 4


async def test_more_checks_than_places(checks: Checks, polkit: Polkit, client: Client, new_client: NewClient) -> None:
    """The bus lets one connection wait for 128 answers; all of these come."""
    clients = [client, *[await new_client(uid) for uid in (NOBODY, NOBODY, DAEMON, DAEMON)]]
    answers = [assign(one) for one in clients for _ in range(32)]
    assert {(await refusal(answer))[0] for answer in answers} == {INTERACTIVE_REQUIRED}


async def test_whoever_asks_for_much_keeps_nobody_waiting_and_is_told_so(
    checks: Checks, polkit: Polkit, client: Client, new_client: NewClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, held, asked = await new_client(DAEMON), asyncio.Semaphore(0), Access.ask

    async def ask(access: Access, call: Call, *about: Any, interactive: bool) -> Any:
        if call.sender == busy.name:
            held.release()
            await asyncio.Event().wait()
        return await asked(access, call, *about, interactive=interactive)

    known, in_line = access_module._person, asyncio.Semaphore(0)

    async def person(uid: int) -> str:
        found = await known(uid)
        in_line.release()
        return found

    monkeypatch.setattr(Access, "ask", ask)
    monkeypatch.setattr(access_module, "_person", person)
    answers = [assign(busy) for _ in range(access_module.QUIET_PLACES)]
    for _ in answers:  # all of them, so that none is let wait less long by what follows
        await asyncio.wait_for(in_line.acquire(), PATIENCE)
    for _ in range(access_module.QUIET_PLACES_PER_PERSON):
        await asyncio.wait_for(held.acquire(), PATIENCE)
    assert (await refusal(assign(client)))[0] == INTERACTIVE_REQUIRED
    # Its others were never asked about, so it is not polkit that does not answer.
    monkeypatch.setattr(access_module, "TIMEOUT", 0.0)
    monkeypatch.setattr(access_module, "PLACE_TIMEOUT", 0.1)
    name, message = await refusal(assign(busy))
    assert name == LIMIT_EXCEEDED and "too much" in message
    assert held.locked() and not any(answer.done() for answer in answers)


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
    assert not router.peers.asked


async def test_a_prompt_may_take_longer_than_an_answer_without_one(
    checks: Checks, polkit: Polkit, client: Client, agent: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wants_authentication(*_: Any) -> bool:
        return True

    monkeypatch.setattr(Access, "_wants_authentication", wants_authentication)
    monkeypatch.setattr(access_module, "TIMEOUT", 0.0)
    answer = assign(client, interactive=True)
    cookie = (await prompt(agent)).body[4]
    await polkit.authenticate(NOBODY, cookie)
    await agent.answer_prompt(ok=True)
    assert await answer == ["/ok"]


async def test_a_caller_of_a_frozen_polkit_can_still_vanish(checks: Checks, polkit: Polkit, client: Client) -> None:
    polkit.freeze()
    assign(client, interactive=True)
    while not checks:  # who the caller is has to be asked first
        await asyncio.sleep(0)
    await client.stop()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(checks[0], PATIENCE)


async def test_an_action_that_polkit_does_not_know_is_a_no(
    checks: Checks, polkit: Polkit, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.begin(
        names.MANAGER_PATH, names.MANAGER, "GetMachine", "s", "org.hostpassd1.unknown", interactive=True
    )
    assert (await refusal(answer))[0] == NOT_AUTHORIZED
    for _ in range(20):  # of whoever has it said again and again the log has one line
        answer = client.begin(names.MANAGER_PATH, names.MANAGER, "GetMachine", "s", "org.hostpassd1.unknown")
        assert (await refusal(answer))[0] == NOT_AUTHORIZED
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "org.hostpassd1.unknown" in record.getMessage()
    assert "/usr/share/polkit-1/actions/org.hostpassd1.policy" in record.getMessage()
