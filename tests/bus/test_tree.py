"""Objects, and what a batch of changes to them comes to on the bus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from hostpassd import names
from hostpassd.bus.router import Batch, Call, Router, Signal, Variant
from tests.bus.busd import Client, Heard
from tests.bus.told import (
    DEVICE,
    INTROSPECTABLE,
    MANAGER,
    MANAGER_PATH,
    NET,
    OBJECT_MANAGER,
    ONE,
    PROPERTIES,
    ROOT,
    STANDARD_ERROR,
    TWO,
    device,
    heard_until_generation,
    introspected,
    managed,
    manager,
    net,
    refusal,
    said,
    strip,
    strip_variants,
)

# --- batches ---


async def test_a_batch_is_told_in_order_and_before_the_reply(served: Router, client: Client) -> None:
    three, hold = names.device_path("three"), {"kind": Variant("s", "hostdev")}

    async def rescan(_: Call) -> Sequence[Any]:
        served.publish(
            Batch(
                added={three: {DEVICE: device(), NET: net()}},
                changed={ONE: {DEVICE: device(Driver="vfio-pci", Label="One!")}},
                signals=[Signal(MANAGER_PATH, MANAGER, "HoldAdded", [ONE, "/m", hold])],
                removed=[TWO],
                last={MANAGER_PATH: {MANAGER: {"Generation": 7}}},
            )
        )
        return []

    served.handle(MANAGER, "Rescan", rescan)
    await client.match()
    await client.call(MANAGER_PATH, MANAGER, "Rescan")
    heard = client.heard[1:]
    assert [(item.kind, item.path, item.member) for item in heard] == [
        ("signal", ROOT, "InterfacesAdded"),
        ("signal", ONE, "PropertiesChanged"),
        ("signal", MANAGER_PATH, "HoldAdded"),
        ("signal", ROOT, "InterfacesRemoved"),
        ("signal", MANAGER_PATH, "PropertiesChanged"),
        ("reply", "", ""),
    ]
    added, changed, hold_added, removed, last, _ = heard
    assert strip(added.body) == [three, {DEVICE: strip_variants(device()), NET: net()}]
    assert strip(changed.body) == [DEVICE, {"Driver": "vfio-pci", "Label": "One!"}, []]
    assert strip(hold_added.body) == [ONE, "/m", {"kind": "hostdev"}]
    assert removed.body == [TWO, [DEVICE, NET]]
    assert strip(last.body) == [MANAGER, {"Generation": 7}, []]


async def test_only_values_that_differ_are_told(served: Router, client: Client) -> None:
    await client.match()
    served.publish(Batch(changed={ONE: {DEVICE: device()}, TWO: {NET: {"Interface": "eth1"}}}))
    served.publish(Batch(changed={ONE: {DEVICE: device(DeviceNodes=("/dev/one",))}}))
    served.publish(Batch(last={MANAGER_PATH: {MANAGER: {"Generation": 1}}}))
    signals = await heard_until_generation(client, 1)
    assert [(item.path, said(item)) for item in signals] == [
        (TWO, {"Interface": "eth1"}),
        (MANAGER_PATH, {"Generation": 1}),
    ]


async def test_one_signal_for_each_interface(served: Router, client: Client) -> None:
    await client.match()
    served.publish(Batch(changed={TWO: {DEVICE: {"Label": "x", "Vendor": "y"}, NET: {"Interface": "eth1"}}}))
    signals = await client.wait_for("PropertiesChanged", 2)
    assert [strip(item.body) for item in signals] == [
        [DEVICE, {"Label": "x", "Vendor": "y"}, []],
        [NET, {"Interface": "eth1"}, []],
    ]


async def test_a_const_value_changes_in_silence(served: Router, client: Client) -> None:
    await client.match()
    served.publish(Batch(changed={ONE: {DEVICE: {"Instance": 2}}}, last={MANAGER_PATH: {MANAGER: {"Generation": 1}}}))
    assert len(await heard_until_generation(client, 1)) == 1
    assert strip(await client.call(ONE, PROPERTIES, "Get", "ss", DEVICE, "Instance")) == [2]
    assert strip(await managed(client))[ONE][DEVICE]["Instance"] == 2


async def test_an_interface_comes_and_goes(served: Router, client: Client) -> None:
    await client.match()
    served.publish(Batch(changed={ONE: {DEVICE: {"Label": "x"}, NET: net()}}))
    served.publish(Batch(changed={ONE: {DEVICE: {"Label": "y"}, NET: None}}))
    served.publish(Batch(changed={ONE: {NET: None}}, last={MANAGER_PATH: {MANAGER: {"Generation": 1}}}))
    signals = await heard_until_generation(client, 1)
    assert [(item.path, item.member) for item in signals] == [
        (ROOT, "InterfacesAdded"),
        (ONE, "PropertiesChanged"),
        (ONE, "PropertiesChanged"),
        (ROOT, "InterfacesRemoved"),
        (MANAGER_PATH, "PropertiesChanged"),
    ]
    assert strip(signals[0].body) == [ONE, {NET: net()}]
    assert signals[3].body == [ONE, [NET]]
    assert list((await managed(client))[ONE]) == [DEVICE]


async def test_the_manager_is_told_like_any_other_object(served: Router, client: Client) -> None:
    [objects] = await client.call(ROOT, OBJECT_MANAGER, "GetManagedObjects")
    assert strip(objects[MANAGER_PATH]) == {MANAGER: manager()} and ROOT not in objects
    assert await client.call(ROOT, PROPERTIES, "GetAll", "s", "") == [{}]
    name, _ = await refusal(client, ROOT, PROPERTIES, "GetAll", "s", MANAGER)
    assert name == STANDARD_ERROR + "UnknownInterface"


async def test_what_comes_and_goes_in_one_batch_leaves_nothing(served: Router, client: Client) -> None:
    three = names.device_path("three")
    await client.match()
    batch = Batch(
        added={three: {DEVICE: device()}}, changed={three: {DEVICE: {"Label": "x"}}}, removed=[three, "/none"]
    )
    served.publish(batch)
    served.publish(Batch(last={MANAGER_PATH: {MANAGER: {"Generation": 1}}}))
    signals = await heard_until_generation(client, 1)
    assert [item.member for item in signals[:3]] == ["InterfacesAdded", "PropertiesChanged", "InterfacesRemoved"]
    assert three not in await managed(client)
    assert "three" not in await introspected(client, names.DEVICES)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch(added={ONE: {DEVICE: device()}}), "there already"),
        (Batch(added={"/x": {DEVICE: {"Name": "only"}}}), "Kind"),
        (Batch(added={"/x": {DEVICE: device(Colour="red")}}), "Colour"),
        (Batch(added={"/x-y": {DEVICE: device()}}), "no object path"),
        (Batch(changed={"/x": {DEVICE: {"Label": "x"}}}), "no such object"),
        (Batch(changed={ONE: {DEVICE: {"Label": 5}}}), "Label"),
        (Batch(changed={ONE: {DEVICE: {"Instance": -1}}}), "Instance t: -1"),
        (Batch(changed={ONE: {DEVICE: {"Parent": "/a\n"}}}), "no object path"),
        (Batch(changed={ONE: {DEVICE: {"Colour": "red"}}}), "Colour"),
        (Batch(signals=[Signal(ONE, MANAGER, "HoldAdded", [])]), "has no org.hostpassd1.Manager"),
        (Batch(signals=[Signal(MANAGER_PATH, MANAGER, "Exploded", [])]), "Exploded"),
        (Batch(signals=[Signal(MANAGER_PATH, MANAGER, "HoldAdded", [ONE])]), "shorter"),
    ],
)
async def test_a_batch_that_does_not_fit_is_not_done_at_all(
    served: Router, client: Client, batch: Batch, said: str
) -> None:
    await client.match()
    before = await managed(client)
    good: dict[str, Any] = {names.device_path("good"): {DEVICE: device()}}
    spoilt = Batch({**good, **batch.added}, batch.changed, batch.signals, batch.removed, batch.last)
    with pytest.raises(Exception) as caught:
        served.publish(spoilt)
    assert said in "".join([str(caught.value), *caught.value.__notes__])
    assert await managed(client) == before
    assert not [heard for heard in client.heard if heard.kind == "signal"]


async def test_folding_the_signals_gives_the_objects(served: Router, client: Client) -> None:
    await client.match()
    folded = await managed(client)
    three = names.device_path("three")
    served.publish(
        Batch(added={three: {DEVICE: device()}}, changed={ONE: {DEVICE: device(Driver="", Companions=[TWO])}})
    )
    served.publish(Batch(changed={three: {NET: net()}, TWO: {NET: None, DEVICE: {"Label": "é \N{GRINNING FACE}"}}}))
    served.publish(Batch(removed=[ONE]))
    served.publish(Batch(added={ONE: {DEVICE: device(Instance=9)}}, last={MANAGER_PATH: {MANAGER: {"Generation": 1}}}))
    for heard in await heard_until_generation(client, 1):
        fold(folded, heard)
    assert folded == await managed(client)


def fold(objects: dict[str, Any], heard: Heard) -> None:
    match heard.member, heard.body:
        case "InterfacesAdded", [path, interfaces]:
            objects.setdefault(path, {}).update(interfaces)
        case "InterfacesRemoved", [path, gone]:
            objects[path] = {key: value for key, value in objects[path].items() if key not in gone}
            if not objects[path]:
                del objects[path]
        case "PropertiesChanged", [interface, values, []] if heard.path != MANAGER_PATH:
            objects[heard.path][interface].update(values)


# --- the tree of nodes ---


async def test_every_node_lists_its_children(served: Router, client: Client) -> None:
    served.publish(Batch(added={names.DEVICES + "2/x": {}, ONE + "0": {DEVICE: device()}}))
    assert await introspected(client, "/") == ["org"]
    assert await introspected(client, "/org") == ["hostpassd1"]
    assert await introspected(client, ROOT) == ["devices", "devices2", "manager"]
    assert await introspected(client, names.DEVICES) == ["net_one", "pci_0000_01_00_0", "pci_0000_01_00_00"]
    assert await introspected(client, ONE) == []


async def test_a_tree_of_nothing(router: Router, client: Client) -> None:
    assert await introspected(client, "/org") == ["hostpassd1"]
    assert await introspected(client, ROOT) == []
    assert await managed(client) == {}


async def test_nodes_go_with_what_is_below_them(served: Router, client: Client) -> None:
    served.publish(Batch(added={names.JOBS + "/1": {}, names.JOBS + "/1/deep/er": {}}))
    served.publish(Batch(removed=[names.JOBS + "/1"]))
    assert await introspected(client, names.JOBS + "/1") == ["deep"]
    served.publish(Batch(removed=[names.JOBS + "/1/deep/er"]))
    name, _ = await refusal(client, names.JOBS, INTROSPECTABLE, "Introspect")
    assert name == STANDARD_ERROR + "UnknownObject"
    served.publish(Batch(removed=[ONE, TWO]))
    assert await introspected(client, ROOT) == ["manager"]


async def test_introspection_looks_at_no_other_objects(served: Router) -> None:
    class Unlisted(dict[str, Any]):
        def __iter__(self) -> Iterator[str]:
            raise AssertionError("all objects were gone through")

    served.table.objects = Unlisted(served.table.objects)
    assert 'name="net_one"' in served.introspect(names.DEVICES)
