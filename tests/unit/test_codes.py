"""The table of codes."""

from __future__ import annotations

import pytest

from hostpassd.model import codes

OF_TYPE: dict[str, codes.Detail] = {"s": "a text", "o": "a name", "i": 7, "as": ("one", "two")}
EXAMPLES = {key: OF_TYPE[type_] for key, type_ in codes.KEYS.items()}


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


@pytest.mark.parametrize("row", codes.WARNINGS.values(), ids=lambda row: row.code)
def test_a_warning_is_told_as_a_reason_is_and_has_no_severity(row: codes.Code) -> None:
    assert row.severity == codes.FACT and set(row.fields) <= codes.KEYS.keys()
    shown = {key: f"a {key}" for key in row.fields}
    found = codes.warning(row.code, **shown)
    assert found.message == codes.say(row.sentence, dict(found.details)) and found.message.endswith(".")
    assert all(text in found.message for text in shown.values()) and not set("{}[]") & set(found.message)
    assert codes.warning(row.code, **dict.fromkeys(row.fields, "")).details == ()


def test_a_part_in_brackets_is_left_out_where_a_detail_is_missing() -> None:
    found = codes.blocker("not-assignable-kind", "net_enp1s0", what="enp1s0", kind="net", owner="")
    assert found.message == "enp1s0 is of a kind that cannot be assigned (net)."


@pytest.mark.parametrize("row", codes.BLOCKERS.values(), ids=lambda row: row.code)
def test_a_message_can_be_told_whatever_detail_is_empty(row: codes.Code) -> None:
    """What a machine or a device calls itself can be nothing."""
    for empty in row.fields:
        details = {key: EXAMPLES[key] for key in row.fields} | {empty: ""}
        assert codes.blocker(row.code, "pci_0000_01_00_0", **details).message


def test_a_sentence_in_another_language_is_made_from_the_same_details() -> None:
    found = codes.blocker("hub", "usb_1_1", what="QEMU USB Hub")
    german = "An {what} hängen andere: nur diese lassen sich zuweisen."
    assert codes.say(german, dict(found.details)) == "An QEMU USB Hub hängen andere: nur diese lassen sich zuweisen."


def test_brackets_and_braces_in_a_detail_are_only_text() -> None:
    found = codes.blocker("hub", "usb_1_1", what="{kind} [x]")
    assert found.message == "{kind} [x] is a USB hub: assign the devices below it."


def test_what_nobody_can_accept_is_told_first() -> None:
    severities = [row.severity for row in codes.BLOCKERS.values()]
    assert severities == sorted(severities)  # never, override
    found = [codes.blocker(code, "usb_1_1", what="x") for code in reversed(list(codes.BLOCKERS))]
    assert [b.code for b in sorted(found, key=lambda b: b.place)] == list(codes.BLOCKERS)
