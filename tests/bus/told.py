"""What the tests of the bus tell on it and how they look at what they hear."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest

from hostpassd import names
from hostpassd.bus import spec
from hostpassd.bus.router import Variant
from tests.bus.busd import Client, Heard, Refused

ROOT, MANAGER_PATH = names.ROOT, names.MANAGER_PATH
MANAGER, DEVICE, NET = names.MANAGER, names.DEVICE, names.DEVICE_NET
PROPERTIES, PEER, INTROSPECTABLE, OBJECT_MANAGER = (
    spec.PROPERTIES,
    spec.PEER,
    spec.INTROSPECTABLE,
    spec.OBJECT_MANAGER,
)
ONE, TWO = names.device_path("pci_0000_01_00_0"), names.device_path("net_one")
ERROR = names.ERROR_PREFIX
STANDARD_ERROR = names.STANDARD_ERROR_PREFIX


def manager(**changes: Any) -> dict[str, Any]:
    return {
        "Version": "1",
        "Features": [],
        "State": "running",
        "Problems": [],
        "Counters": {},
        "Hypervisors": [],
        "Generation": 0,
        **changes,
    }


def device(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "Name": "one",
        "Kind": "pci",
        "Role": "device",
        "Owner": ONE,
        "Id": "8086:10d3",
        "SysfsPath": "/sys/devices/one",
        "Instance": 1,
        "Parent": "/",
        "Children": [],
        "DeviceNodes": ["/dev/one"],
        "Driver": "e1000e",
        "Label": "One",
        "Location": "0000:01:00.0",
        "Category": "network",
        "Vendor": "",
        "Product": "",
        "Serial": "",
        "Assignable": True,
        "Blockers": [[ONE, "hub", "never", {"what": Variant("s", "One")}, "It is a hub."]],
        "Companions": [],
        "Holders": [["/org/hostpassd1/machines/a", {"kind": Variant("s", "hostdev"), "live": Variant("b", True)}]],
        "HostUses": [[ONE, "keyboard", {"seat": Variant("s", "seat0")}, "It is a keyboard."]],
    }
    return values | changes


def net(**changes: Any) -> dict[str, Any]:
    return {"Interface": "eth0", "MacAddress": "52:54:00:00:00:01", **changes}


def strip(value: Any) -> Any:
    """VALUE without its variants' signatures."""
    match value:
        case {"v": [_, inner], **rest} if not rest:
            return strip(inner)
        case dict():
            return {key: strip(item) for key, item in value.items()}
        case list():
            return [strip(item) for item in value]
    return value


async def managed(client: Client) -> dict[str, Any]:
    """What GetManagedObjects tells, without the Manager."""
    [objects] = await client.call(ROOT, OBJECT_MANAGER, "GetManagedObjects")
    return {path: interfaces for path, interfaces in objects.items() if path != MANAGER_PATH}


async def heard_until_generation(client: Client, generation: int) -> list[Heard]:
    """The signals up to the one that tells GENERATION."""
    await client.wait_for(lambda heard: heard.path == MANAGER_PATH and said(heard).get("Generation") == generation)
    return [heard for heard in client.heard if heard.kind == "signal"]


def said(heard: Heard) -> dict[str, Any]:
    """The new values that a PropertiesChanged tells."""
    return dict(strip(heard.body[1])) if heard.member == "PropertiesChanged" else {}


async def refusal(client: Client, *call: Any, **options: Any) -> tuple[str, str]:
    """The name and the message of the error that a call gets."""
    with pytest.raises(Refused) as caught:
        await client.call(*call, **options)
    return caught.value.name, caught.value.message


def strip_variants(value: Any) -> Any:
    match value:
        case Variant():
            return strip_variants(value.value)
        case dict():
            return {key: strip_variants(item) for key, item in value.items()}
        case list():
            return [strip_variants(item) for item in value]
    return value


async def introspected(client: Client, path: str) -> list[str]:
    return [node.get("name", "") for node in (await introspection(client, path)).iterfind("node")]


async def introspection(client: Client, path: str) -> ET.Element:
    [text] = await client.call(path, INTROSPECTABLE, "Introspect")
    assert text.startswith("<!DOCTYPE node")
    return ET.fromstring(text)
