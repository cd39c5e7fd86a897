"""Steps by themselves: rows, undo, and what shows."""

from __future__ import annotations

import dataclasses

import pytest

from hostpassd.machines.domain_xml import claim_of, hostdev_xml
from hostpassd.model.machine import Settings
from hostpassd.passthrough.steps import STEPS, Attach, Detach, Reattach, Seen, Step, Store, Unplug, Unstore
from tests.sim.world import hostdev, machine, pci

NIC = pci("0000:01:00.0", group=2)
CLAIM = hostdev(NIC, alias="ua-1")
ALL: list[Step] = [
    Store("nic", CLAIM),
    Unstore("nic", CLAIM),
    Detach("nic", "e1000e"),
    Reattach("nic"),
    Attach("nic", "ua-1", CLAIM.xml),
    Unplug("nic", "ua-1", CLAIM.id),
]
ids = pytest.mark.parametrize("step", ALL, ids=lambda step: step.code)


def test_every_step_is_tried_here() -> None:
    assert [step.code for step in ALL] == list(STEPS)


@ids
def test_a_row_comes_to_the_step_that_made_it(step: Step) -> None:
    assert STEPS[step.code].of(step.device, step.fields()) == step


@ids
def test_a_row_with_a_field_more_is_another_versions(step: Step) -> None:
    with pytest.raises((TypeError, ValueError)):
        STEPS[step.code].of(step.device, {**step.fields(), "colour": "red"})


@ids
def test_what_takes_a_step_back_is_about_the_same_device_and_is_not_taken_back_in_circles(step: Step) -> None:
    back = step.undo()
    assert (back is None) == (step.asks_guest or step.is_owed)
    assert back is None or back.device == step.device


def test_all_that_was_chosen_is_in_the_row_and_libvirts_own_words_for_it_show_the_step() -> None:
    chosen = Settings(driver="mlx5_vfio_pci", rom_bar=True, boot_order=2)
    xml = hostdev_xml(NIC, alias="ua-1", config=True, unique=True, rom_file="/usr/share/x.rom", settings=chosen)
    store = Store("nic", claim_of(xml))
    for step in (store, store.undo(), Attach("nic", "ua-1", xml)):
        assert STEPS[step.code].of(step.device, step.fields()) == step
    written = xml.replace('"', "'").replace("</hostdev>", "<address type='pci' bus='1'/></hostdev>")
    taken = machine(config=(claim_of(written),))
    assert store.is_to_be_undone(Seen(taken, ())) and not store.shows(Seen(machine(), ()))


HERE, GONE = machine(live=(CLAIM,), config=(CLAIM,)), machine()


@pytest.mark.parametrize(
    ("step", "shown", "hidden"),
    [
        (ALL[0], Seen(HERE, ()), Seen(GONE, ())),
        (ALL[1], Seen(GONE, ()), Seen(HERE, ())),
        (ALL[2], Seen(HERE, {"nic"}), Seen(HERE, ())),
        (ALL[3], Seen(HERE, ()), Seen(HERE, {"nic"})),
        (ALL[4], Seen(HERE, ()), Seen(GONE, ())),
        (ALL[5], Seen(GONE, ()), Seen(HERE, ())),
    ],
    ids=[step.code for step in ALL],
)
def test_one_sees_that_it_is_done(step: Step, shown: Seen, hidden: Seen) -> None:
    assert step.shows(shown) and not step.shows(hidden)


def test_what_others_stored_meanwhile_stands_in_for_what_was_taken_out() -> None:
    others = dataclasses.replace(CLAIM, alias="")
    seen = Seen(machine(config=(others,)), ())
    assert ALL[1].shows(seen) and not ALL[1].is_to_be_undone(seen)


def test_of_a_machine_that_is_gone_nothing_shows_but_that_nothing_is_in_it() -> None:
    gone = Seen(None, ())
    assert [step.code for step in ALL if step.shows(gone)] == ["reattach", "unplug"]


def test_an_alias_that_another_claim_has_by_now_is_not_ours() -> None:
    assert Unplug("nic", "ua-1", "hostdev:usb:1234:0001").shows(Seen(HERE, ()))
    assert not Unplug("nic", "ua-1").shows(Seen(HERE, ()))
