"""What can go wrong, one class each. A message is one sentence: what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from hostpassd.model.codes import Blocker
from hostpassd.model.text import clean

# Characters of a message. What the bus carries of it is less.
TEXT_LIMIT = 128 * 1024


class HostpassError(Exception):
    """An error that a caller is told. `name`: what it is called; a subclass without one of its own is told as its base.

    Messages quote devices, machines and callers, so whatever they are made of is made fit to be shown here.
    """

    name = "Failed"

    def __init__(self, message: str) -> None:
        super().__init__(clean(message, TEXT_LIMIT))


class Failed(HostpassError):
    name = "Failed"


class StateFolderError(Failed):
    """The intent log cannot be written, so the operation is refused before anything is done."""


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
    """What blocks it is in `blockers`: those that the caller does not accept, or cannot."""

    name = "Blocked"

    def __init__(self, message: str, blockers: Sequence[Blocker] = ()) -> None:
        super().__init__(message)
        self.blockers = tuple(blockers)


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


class UnplugPending(HypervisorRefused):
    """The guest was asked for that device before, and has not answered yet: libvirt does not ask twice."""


class NoFreePort(HypervisorRefused):
    """The running machine has no free place for a PCI device."""


class WholeCardOnly(HypervisorRefused):
    """libvirt takes no single function out of a slot of a running machine."""


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


class UnknownInterface(HostpassError):
    name = "UnknownInterface"


class UnknownMethod(HostpassError):
    name = "UnknownMethod"


class UnknownProperty(HostpassError):
    name = "UnknownProperty"


class PropertyReadOnly(HostpassError):
    name = "PropertyReadOnly"


class InvalidArgs(HostpassError):
    name = "InvalidArgs"


class InteractiveAuthorizationRequired(HostpassError):
    name = "InteractiveAuthorizationRequired"
