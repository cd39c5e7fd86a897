"""What callers are told: each message is a sentence."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from hostpassd import errors
from hostpassd.model.codes import blocker
from hostpassd.model.machine import MachineKey
from hostpassd.passthrough.assign import Assign
from hostpassd.passthrough.request import Options, Plan
from tests.unit.test_docs import CODE

ERRORS = {kind.__name__ for kind in errors.HostpassError.__subclasses__()}
MODULES = sorted(path.relative_to(CODE).as_posix() for path in CODE.rglob("*.py"))


def messages(module: str) -> Iterator[tuple[str, str]]:
    """The beginning and the end of each message in MODULE that an error is made with; a value counts as "{}"."""
    for call in ast.walk(ast.parse((CODE / module).read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and ast.unparse(call.func).removeprefix("errors.") in ERRORS and call.args:
            match call.args[0]:
                case ast.Constant(str(text)):
                    yield text, text
                case ast.JoinedStr(values):
                    parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in values]
                    yield parts[0], parts[-1]


def test_messages_are_found() -> None:
    assert len([text for module in MODULES for text in messages(module)]) > 60


@pytest.mark.parametrize("module", MODULES)
def test_a_message_begins_with_a_capital_letter_and_ends_with_a_full_stop(module: str) -> None:
    for beginning, end in messages(module):
        # These names are written small.
        assert not beginning[0].islower() or beginning.startswith(("hostpassd", "libvirt", "polkit", "udev")), beginning
        assert end.endswith((".", "{}")), end  # a value at the end: sentences of their own


def test_what_blocks_a_plan_is_told_sentence_by_sentence() -> None:
    found = tuple(blocker(code, "usb_1_1", what="A hub") for code in ("hub", "not-leaf"))
    request = Assign("vm", ("usb_1_1",), Options(), 0)
    plan = Plan(request, MachineKey("", ""), ("usb_1_1",), ("usb_1_1",), (1,), (), (), blockers=found)
    with pytest.raises(errors.Blocked) as caught:
        plan.check_allowed()
    assert str(caught.value) == (
        "usb_1_1 cannot be assigned: hub: A hub is a USB hub: assign the devices below it. "
        "not-leaf: Devices that can be assigned by themselves are below A hub: assign those."
    )
