"""What a step that could not be done means for its operation: pure."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hostpassd import errors
from hostpassd.passthrough.steps import Step
from hostpassd.passthrough.waiting import StillAtIt


class Then(enum.Enum):
    """What becomes of an operation that has failed."""

    UNDO = enum.auto()  # it is undone, now
    STOP = enum.auto()  # it stays as it is: what a guest was asked cannot be taken back, and nobody waits any more
    FINISH = enum.auto()  # a guest was asked, and has let go: what is left to be done is tried again
    ON_RETURN = enum.auto()  # it is undone or finished when libvirt is back, as nobody can see now what is true
    AT_WORK = enum.auto()  # the same, when libvirt has returned from the call that it is still at


class Outcome(NamedTuple):
    """What becomes of it, and how many of its steps had begun, the first ones."""

    then: Then
    begun: int


# With these libvirt says that it has not done what it was asked for.
REFUSALS = (errors.HypervisorRefused, errors.NotSupported, errors.NoSuchMachine)
# After these nobody goes on asking.
_GIVEN_UP = (errors.GuestDidNotRelease, errors.Cancelled, errors.TimedOut)


def outcome(begun: Sequence[Step], error: Exception, *, away: bool) -> Outcome:
    """What ERROR in the last of the BEGUN steps means; AWAY: the hypervisor cannot be reached."""
    if isinstance(error, StillAtIt):
        return Outcome(Then.AT_WORK, len(begun))
    if begun and begun[-1].asks_guest and isinstance(error, REFUSALS):
        begun = begun[:-1]  # so no guest was asked
    asked = has_asked(begun)
    if asked and isinstance(error, _GIVEN_UP):
        return Outcome(Then.STOP, len(begun))
    if away or isinstance(error, errors.HypervisorUnavailable):
        return Outcome(Then.ON_RETURN, len(begun))
    return Outcome(Then.FINISH if asked else Then.UNDO, len(begun))


def has_asked(begun: Iterable[Step]) -> bool:
    """Whether a guest was asked to let go: that cannot be taken back."""
    return any(step.asks_guest for step in begun)


class Failure(NamedTuple):
    """A step that could not be done, and why."""

    step: Step
    error: errors.HostpassError

    def __str__(self) -> str:
        return f"{self.step.text} ({bare(self.error)})"


def is_over(failures: Iterable[Failure]) -> bool:
    """Whether nothing is left that could be tried again: what a guest keeps, only the guest can give."""
    return all(isinstance(failure.error, errors.GuestDidNotRelease) for failure in failures)


def bare(error: Exception) -> str:
    """The message of ERROR, to stand in another one."""
    return str(error).removesuffix(".")


def with_more(error: Exception, more: str) -> Exception:
    """ERROR with MORE in its message; a fault of our own keeps its own."""
    return type(error)(f"{bare(error)}; {more}.") if isinstance(error, errors.HostpassError) else error
