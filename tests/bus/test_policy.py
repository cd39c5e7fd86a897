"""The shipped files that grant rights: bus policy, polkit actions and rules, the unit."""

from __future__ import annotations

import asyncio
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hostpassd import errors, names
from hostpassd.bus.router import Batch, Call, Router
from hostpassd.bus.spec import OBJECT_MANAGER, PROPERTIES, Specification
from tests.bus import told
from tests.bus.busd import (
    AUTHORITY,
    DRIVER,
    PROJECT,
    SHIPPED_ACTIONS,
    SHIPPED_POLICY,
    Client,
    Polkit,
    PrivateBus,
    Refused,
    process_details,
)
from tests.bus.conftest import NewClient

UNIT = PROJECT / "systemd" / "hostpassd.service"
RULES = PROJECT / "systemd" / "50-hostpassd-libvirt.rules"
LIBVIRT_ACTION = "org.libvirt.unix.manage"
LIBVIRT_POLICY = f"""<policyconfig><action id="{LIBVIRT_ACTION}"><description>d</description><message>m</message>
<defaults><allow_any>no</allow_any></defaults></action></policyconfig>"""

ACTIONS = set(map(names.action_id, names.ACTIONS))
KEEP = {names.action_id("assign"), names.action_id("dismiss")}
DAEMON, BIN, NOBODY = 1, 2, 65534


async def request_name(client: Client) -> Any:
    return await client.call(DRIVER[1], DRIVER[2], "RequestName", "su", names.BUS_NAME, 4, destination=DRIVER[0])


# --- the bus policy ---


@pytest.mark.parametrize("uid", [DAEMON, NOBODY])
async def test_others_cannot_own_the_name(new_client: NewClient, uid: int) -> None:
    with pytest.raises(Refused) as caught:
        await request_name(await new_client(uid))
    assert caught.value.name == "org.freedesktop.DBus.Error.AccessDenied"


async def test_the_services_user_can_own_the_name(tmp_path: Path, broker: str) -> None:
    """Under the shipped policy with a user that exists here in hostpassd's place."""
    shipped = SHIPPED_POLICY.read_text(encoding="utf-8")
    assert shipped.count('user="hostpassd"') == 1
    policy = tmp_path / "policy.conf"
    policy.write_text(shipped.replace('user="hostpassd"', 'user="daemon"'), encoding="utf-8")
    with PrivateBus(policy, broker) as bus:
        daemon, other = Client(DAEMON), Client(BIN)
        try:
            await daemon.start(bus.address)
            await other.start(bus.address)
            assert await request_name(daemon) == [1]
            with pytest.raises(Refused):
                await request_name(other)
        finally:
            await daemon.stop()
            await other.stop()


@pytest.mark.parametrize("uid", [0, DAEMON, NOBODY])
async def test_all_can_read_and_call(router: Router, new_client: NewClient, uid: int) -> None:
    async def assign(_: Call) -> Sequence[Any]:
        return [names.ROOT]

    router.publish(Batch(added={names.MANAGER_PATH: {names.MANAGER: told.manager()}}))
    router.handle(names.MANAGER, "Assign", assign)
    client = await new_client(uid)
    await client.match()
    [objects] = await client.call(names.ROOT, OBJECT_MANAGER, "GetManagedObjects")
    assert list(objects) == [names.MANAGER_PATH]
    assert await client.call(names.MANAGER_PATH, PROPERTIES, "Get", "ss", names.MANAGER, "Version") == [
        {"v": ["s", "1"]}
    ]
    assert await client.call(names.MANAGER_PATH, names.MANAGER, "Assign", "sasa{sv}", "m", ["d"], {}) == [names.ROOT]
    router.publish(Batch(last={names.MANAGER_PATH: {names.MANAGER: {"Generation": 1}}}))
    await client.wait_for("PropertiesChanged")


async def test_all_can_call_every_interface_that_has_methods(
    router: Router, client: Client, specification: Specification
) -> None:
    for name, interface in specification.interfaces.items():
        for member in interface.methods:
            with pytest.raises(Refused) as caught:
                await client.call("/nowhere", name, member)
            assert caught.value.name == "org.freedesktop.DBus.Error.UnknownObject", name


async def test_the_policy_names_no_interface_that_is_not(specification: Specification) -> None:
    nodes = ET.parse(SHIPPED_POLICY).getroot().iter("allow")
    named = {node.get("send_interface", "") for node in nodes} - {""}
    ours = {name for name in named if name.startswith(names.BUS_NAME)}
    assert ours <= set(specification.interfaces)


async def test_others_interfaces_do_not_reach_the_daemon(router: Router, client: Client) -> None:
    with pytest.raises(Refused) as caught:
        await client.call(names.ROOT, "org.example.Other", "Do")
    assert caught.value.name == "org.freedesktop.DBus.Error.AccessDenied"


# --- polkit's actions ---


async def test_pkaction_lists_every_action(bus: PrivateBus) -> None:
    async with Polkit(bus):
        process = await asyncio.create_subprocess_exec(
            "pkaction", env={"DBUS_SYSTEM_BUS_ADDRESS": bus.address}, stdout=subprocess.PIPE
        )
        listed, _ = await process.communicate()
    ours = {line for line in listed.decode().split() if line.startswith(names.BUS_NAME + ".")}
    assert ours == ACTIONS


def test_every_action_has_the_defaults_of_the_design() -> None:
    actions = {node.get("id", ""): node for node in ET.parse(SHIPPED_ACTIONS).getroot().iter("action")}
    assert set(actions) == ACTIONS
    for action, node in actions.items():
        keep = "auth_admin_keep" if action in KEEP else "auth_admin"
        found = [node.findtext(f"defaults/{who}") for who in ("allow_any", "allow_inactive", "allow_active")]
        assert found == ["auth_admin", "auth_admin", keep]
        owner = node.find("annotate[@key='org.freedesktop.policykit.owner']")
        assert owner is not None
        assert owner.text == "unix-user:hostpassd"


async def test_the_rule_lets_the_services_user_and_nobody_else_manage_machines(
    bus: PrivateBus, tmp_path: Path, new_client: NewClient
) -> None:
    """The shipped rule with a user that exists here in hostpassd's place."""
    shipped = RULES.read_text(encoding="utf-8")
    assert shipped.count('"hostpassd"') == 1
    actions = tmp_path / "hostpassd-test-libvirt.policy"
    actions.write_text(LIBVIRT_POLICY, encoding="utf-8")
    async with Polkit(bus, rules=shipped.replace('"hostpassd"', '"daemon"'), actions=actions) as polkit:
        for uid, wanted in ((DAEMON, True), (BIN, False)):
            client = await new_client(uid)
            body = [["unix-process", process_details(client.process.pid, uid)], LIBVIRT_ACTION, {}, 0, ""]
            [[authorized, _, _]] = await polkit.ask(*AUTHORITY, "CheckAuthorization", "(sa{sv})sa{ss}us", body)
            assert authorized == wanted


# --- errors ---


def test_every_error_has_a_name_of_its_own_or_that_of_what_it_is_a_kind_of() -> None:
    found = [
        value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    classes = [
        value for value in found if issubclass(value, errors.HostpassError) and value is not errors.HostpassError
    ]
    own = [value for value in classes if value.__base__ is errors.HostpassError]
    assert all(value.name == value.__name__ for value in own)
    for kind in set(classes) - set(own):
        assert kind.__base__ in own and kind.name == kind.__base__.__name__


# --- the unit ---


def test_the_unit_is_valid() -> None:
    run = subprocess.run(["systemd-analyze", "verify", UNIT], capture_output=True, text=True, check=False)
    assert [line for line in run.stderr.splitlines() if "hostpassd" in line] == []
    assert run.returncode == 0


def test_the_unit_is_started_again_without_limit_but_not_over_its_configuration() -> None:
    lines = UNIT.read_text(encoding="utf-8").splitlines()
    assert {"StartLimitIntervalSec=0", "Restart=on-failure", "RestartPreventExitStatus=78"} <= set(lines)
    assert lines.index("StartLimitIntervalSec=0") < lines.index("[Service]")  # elsewhere it is not known


def test_the_units_exposure() -> None:
    run = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", UNIT],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"exposure level for \S+: ([\d.]+)", run.stdout)
    assert found
    assert float(found[1]) <= 1.2
