"""The options of operations: a{sv} -> Options. What is unknown or of the wrong type is refused, never ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hostpassd import errors
from hostpassd.bus.router import Variant
from hostpassd.model.codes import BLOCKERS, OVERRIDABLE
from hostpassd.model.drivers import DRIVER_NAME
from hostpassd.model.machine import STARTUP_POLICIES
from hostpassd.passthrough.request import Options

DISMISS = {"live": "b", "config": "b", "instance": "t", "timeout": "u", "wait": "b", "plan": "s"}
ASSIGN = {
    **DISMISS,
    "guest-address": "s",
    "rom-bar": "b",
    "rom-file": "s",
    "driver": "s",
    "startup-policy": "s",
    "boot-order": "u",
    "override": "as",
}
LIST_CANDIDATES = {"all": "b"}

# How texts look, and what they are in words.
_TEXTS = {
    "guest-address": (
        re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7]"),
        "a PCI address such as 0000:04:00.0",
    ),
    "driver": (DRIVER_NAME, "the name of a kernel module such as mlx5_vfio_pci"),
    "startup-policy": (re.compile("|".join(STARTUP_POLICIES)), f"one of {', '.join(STARTUP_POLICIES)}"),
}
# The highest that numbers can be, from 1 on, and what they are in words.
_NUMBERS = {
    # An hour: longer, nobody is waiting any more, and the group stays locked.
    "timeout": (3600, "a number of seconds"),
    # QEMU's bootindex is a signed number of 32 bits.
    "boot-order": (2**31 - 1, "a number"),
}


def read(options: Mapping[str, Variant], known: Mapping[str, str], default: Options) -> Options:
    """OPTIONS as a caller gave them, of those KNOWN (name: signature), on top of DEFAULT. Error: InvalidOption."""
    values = given(options, known)
    _check(values)
    if "override" in values:
        values["override"] = _codes(values["override"])
    return dataclasses.replace(default, **{name.replace("-", "_"): value for name, value in values.items()})


def given(options: Mapping[str, Variant], known: Mapping[str, str]) -> dict[str, Any]:
    """The values of OPTIONS, all of them KNOWN (name: signature). Error: InvalidOption."""
    for name, variant in options.items():
        if name not in known:
            raise errors.InvalidOption(
                f"There is no option {name[:40]!r} here: the options are {', '.join(sorted(known))}."
            )
        if variant.signature != known[name]:
            raise errors.InvalidOption(f"The option {name} is of type {known[name]}, not {variant.signature[:40]}.")
    return {name: variant.value for name, variant in options.items()}


def _check(values: Mapping[str, Any]) -> None:
    for name, (highest, what) in _NUMBERS.items():
        if not 0 < values.get(name, 1) <= highest:
            raise errors.InvalidOption(f"The option {name} is {what} from 1 to {highest}.")
    for name, (pattern, what) in _TEXTS.items():
        if name in values and not pattern.fullmatch(values[name]):
            raise errors.InvalidOption(f"The option {name} is {what}.")
    if "rom-file" in values and not values.get("rom-bar", True):
        raise errors.InvalidOption(
            "The option rom-file shows the machine a ROM and rom-bar hides it: leave one of them out."
        )


def _codes(override: Sequence[str]) -> frozenset[str]:
    for code in sorted(set(override) - BLOCKERS.keys()):
        known = ", ".join(sorted(OVERRIDABLE))
        raise errors.InvalidOption(f"There is no blocker {code[:40]!r}: those that can be overridden are {known}.")
    return frozenset(override)
