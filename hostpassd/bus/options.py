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
ASSIGN = {**DISMISS, "guest-address": "s", "rom-bar": "b", "override": "as"}
LIST_CANDIDATES = {"all": "b"}

_GUEST_ADDRESS = re.compile(r"[0-9a-fA-F]{4}:[0-9a-fA-F]{2}:[01][0-9a-fA-F]\.[0-7]")

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
    address = values.get("guest_address")
    if address is not None and not _GUEST_ADDRESS.fullmatch(address):
        raise errors.InvalidOption("The option guest-address is a PCI address such as 0000:04:00.0.")
