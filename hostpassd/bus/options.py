"""The options of operations: a{sv} -> Options. What is unknown or of the wrong type is refused, never ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from hostpassd import errors
from hostpassd.bus.router import Variant
from hostpassd.model.codes import BLOCKERS, OVERRIDABLE
from hostpassd.passthrough.request import Options

DISMISS = {"live": "b", "config": "b", "instance": "t", "timeout": "u", "wait": "b", "plan": "s"}
ASSIGN = {
    **DISMISS,
    "startup-policy": "s",
    "driver": "s",
    "rom-bar": "b",
    "rom-file": "s",
    "boot-order": "u",
    "guest-address": "s",
    "override": "as",
}
LIST_CANDIDATES = {"all": "b"}

# The texts that can be told by their looks, and what each is.
_TEXTS = {
    "guest_address": (
        re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7]"),
        "a PCI address such as 0000:04:00.0",
    ),
    "startup_policy": (re.compile("mandatory|requisite|optional"), "one of mandatory, requisite, optional"),
    "rom_file": (re.compile("/.+", re.DOTALL), "the whole path of a file"),
    "driver": (re.compile(r"[A-Za-z0-9_-]{1,64}"), "the name of a driver of the kernel, such as mlx5_vfio_pci"),
}

# An hour: longer, nobody is waiting any more, and the group stays locked.
_LONGEST = 3600


def read(options: Mapping[str, Variant], known: Mapping[str, str], default: Options) -> Options:
    """OPTIONS as a caller gave them, of those KNOWN (name: signature), on top of DEFAULT. Error: InvalidOption."""
    values = {name.replace("-", "_"): value for name, value in given(options, known).items()}
    _check(values)
    return dataclasses.replace(default, **values)


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


def _check(values: dict[str, Any]) -> None:
    if not 0 < values.get("timeout", 1) <= _LONGEST:
        raise errors.InvalidOption(f"The option timeout is a number of seconds from 1 to {_LONGEST}.")
    if "override" in values:
        values["override"] = frozenset(values["override"])
        for code in sorted(values["override"] - BLOCKERS.keys()):
            known = ", ".join(sorted(OVERRIDABLE))
            raise errors.InvalidOption(f"There is no blocker {code[:40]!r}: those that can be overridden are {known}.")
    if values.get("boot_order") == 0:
        raise errors.InvalidOption("The option boot-order is a place in the machine's boot order, from 1 on.")
    for name, (pattern, words) in _TEXTS.items():
        if name in values and not pattern.fullmatch(values[name]):
            raise errors.InvalidOption(f"The option {name.replace('_', '-')} is {words}.")
