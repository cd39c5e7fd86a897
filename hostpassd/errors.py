"""What can go wrong, by name. A message is one sentence: what is wrong and what to do."""

from __future__ import annotations

from hostpassd.model.text import clean

# Characters of a message. What the bus carries of it is less.
TEXT_LIMIT = 128 * 1024


class HostpassError(Exception):
    """An error a caller is told. `name`: its bus name without the prefix; `standard`: D-Bus's own, not ours.

    Messages quote devices, machines and callers, so whatever they are made of is made fit to be shown here.
    """

    name = "Failed"
    standard = False

    def __init__(self, message: str) -> None:
        super().__init__(clean(message, TEXT_LIMIT))


class Failed(HostpassError):
    name = "Failed"


class StateFolderError(Failed):
    """What is about to be done cannot be written down first, so it is not done."""


class NotAuthorized(HostpassError):
    name = "NotAuthorized"


class NoSuchDevice(HostpassError):
    name = "NoSuchDevice"


class AmbiguousDevice(HostpassError):
    name = "AmbiguousDevice"


class NoSuchMachine(HostpassError):
    name = "NoSuchMachine"


class AmbiguousMachine(HostpassError):
    name = "AmbiguousMachine"


class Blocked(HostpassError):
    name = "Blocked"


class TimedOut(HostpassError):
    name = "TimedOut"


class AlreadyAssigned(HostpassError):
    name = "AlreadyAssigned"


class NotAssigned(HostpassError):
    name = "NotAssigned"


class StalePlan(HostpassError):
    name = "StalePlan"


class HypervisorUnavailable(HostpassError):
    name = "HypervisorUnavailable"


class HypervisorRefused(HostpassError):
    name = "HypervisorRefused"


class GuestDidNotRelease(HostpassError):
    name = "GuestDidNotRelease"


class Cancelled(HostpassError):
    name = "Cancelled"


class InvalidOption(HostpassError):
    name = "InvalidOption"


class NotSupported(HostpassError):
    name = "NotSupported"


class LimitExceeded(HostpassError):
    name = "LimitExceeded"


class UnknownObject(HostpassError):
    name = "UnknownObject"
    standard = True


class UnknownInterface(HostpassError):
    name = "UnknownInterface"
    standard = True


class UnknownMethod(HostpassError):
    name = "UnknownMethod"
    standard = True


class UnknownProperty(HostpassError):
    name = "UnknownProperty"
    standard = True


class PropertyReadOnly(HostpassError):
    name = "PropertyReadOnly"
    standard = True


class InvalidArgs(HostpassError):
    name = "InvalidArgs"
    standard = True


class InteractiveAuthorizationRequired(HostpassError):
    name = "InteractiveAuthorizationRequired"
    standard = True


def by_name(name: str, message: str) -> HostpassError:
    """The error called NAME (without prefix) with MESSAGE."""
    kinds = {kind.name: kind for kind in HostpassError.__subclasses__()}
    return kinds.get(name, Failed)(message)
