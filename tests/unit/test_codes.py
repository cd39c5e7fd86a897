"""The table of codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hostpassd.model import codes
from tests import template

OF_TYPE: dict[str, codes.Detail] = {"s": "a text", "o": "a name", "i": 7, "as": ("one", "two")}
EXAMPLES = {key: OF_TYPE[type_] for key, type_ in codes.KEYS.items()}
FACTS = [row for name, table in codes.TABLES.items() if name != "blocker" for row in table.values()]

# What a translator makes of ten of the sentences; {fields} and [parts] are the same, in the order of that language.
GERMAN: dict[str, str] = json.loads(Path(__file__).with_name("german.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("place", "german"), GERMAN.items(), ids=list(GERMAN))
def test_a_message_can_be_said_in_another_language_from_its_details_alone(place: str, german: str) -> None:
    table, code = place.split()
    row = codes.TABLES[table][code]
    shown = {key: EXAMPLES[key] for key in row.fields}
    told = codes.say(german, shown)
    assert set(dataclasses.replace(row, sentence=german).fields) == set(row.fields) and not set("{}[]") & set(told)
    for key in row.fields:
        assert codes.say(f"{{{key}}}", shown) in told


@pytest.mark.parametrize("row", codes.BLOCKERS.values(), ids=lambda row: row.code)
def test_a_message_is_the_sentence_and_the_details_and_nothing_else(row: codes.Code) -> None:
    assert set(row.fields) <= codes.KEYS.keys()
    found = codes.blocker(row.code, "pci_0000_01_00_0", **{key: EXAMPLES[key] for key in row.fields})
    assert found.severity == row.severity in (codes.NEVER, codes.OVERRIDE)
    for key in row.fields:
        shown = EXAMPLES[key]
        assert (", ".join(shown) if isinstance(shown, tuple) else str(shown)) in found.message
    assert not set("{}[]") & set(found.message)
    assert found.message.endswith(".")


@pytest.mark.parametrize("row", FACTS, ids=lambda row: row.code)
def test_a_fact_is_told_as_a_reason_is_but_has_no_severity(row: codes.Code) -> None:
    assert row.severity == codes.FACT and set(row.fields) <= codes.KEYS.keys()
    shown = {key: EXAMPLES[key] for key in row.fields}
    message = codes.fact(row, "net_enp1s0", **shown).message
    assert message == codes.say(row.sentence, shown) and message.endswith(".")
    assert not set("{}[]") & set(message)


def test_rows_of_one_code_are_gathered_into_one_with_all_that_is_in_them() -> None:
    rows = [
        codes.detailed(mount_points=("/srv", "/mnt"), volumes=("/dev/sda1",)),
        codes.detailed(mount_points=("/home",), volumes=("/dev/sda1",), paths=()),
    ]
    assert codes.gathered(rows) == {"mount-points": ("/home", "/mnt", "/srv"), "volumes": ("/dev/sda1",)}
    assert codes.gathered([]) == {}


def test_a_blocker_is_within_one_that_says_as_much_or_more() -> None:
    less = codes.blocker("mounted", "block_sda", what="Disk", mount_points=("/srv",))
    more = codes.blocker("mounted", "block_sda", what="Disk", mount_points=("/mnt", "/srv"), volumes=("/dev/sda1",))
    assert less.is_within(less) and less.is_within(more) and not more.is_within(less)
    for other in (
        codes.blocker("storage-stack", "block_sda", what="Disk", mount_points=("/srv",)),
        codes.blocker("mounted", "block_sdb", what="Disk", mount_points=("/srv",)),
        codes.blocker("mounted", "block_sda", what="Another", mount_points=("/srv",)),
    ):
        assert not less.is_within(other)


def test_a_part_in_brackets_is_left_out_where_a_detail_is_missing() -> None:
    found = codes.blocker("not-assignable-kind", "net_enp1s0", what="enp1s0", kind="net", owner="")
    assert found.message == "enp1s0 is of a kind that cannot be assigned (net)."


@pytest.mark.parametrize("row", codes.BLOCKERS.values(), ids=lambda row: row.code)
def test_a_message_can_be_told_whatever_detail_is_empty(row: codes.Code) -> None:
    """What a machine or a device calls itself can be nothing."""
    for empty in row.fields:
        details = {key: EXAMPLES[key] for key in row.fields} | {empty: ""}
        assert codes.blocker(row.code, "pci_0000_01_00_0", **details).message


def test_brackets_and_braces_in_a_detail_are_only_text() -> None:
    found = codes.blocker("hub", "usb_1_1", what="{kind} [x]")
    assert found.message == "{kind} [x] is a USB hub: assign the devices below it."


def test_what_nobody_can_accept_is_told_first() -> None:
    severities = [row.severity for row in codes.BLOCKERS.values()]
    assert severities == sorted(severities)  # never, override
    found = [codes.blocker(code, "usb_1_1", what="x") for code in reversed(list(codes.BLOCKERS))]
    assert [b.code for b in sorted(found, key=lambda b: b.place)] == list(codes.BLOCKERS)


def test_the_template_for_translators_has_every_sentence_of_every_table() -> None:
    text = template.text()
    for name, table in codes.TABLES.items():
        for row in table.values():
            sentence = row.sentence.replace('"', '\\"')
            assert f'#. {row.meaning}\nmsgctxt "{name} {row.code}"\nmsgid "{sentence}"\nmsgstr ""\n' in text
    assert text.count("msgctxt") == sum(map(len, codes.TABLES.values()))
