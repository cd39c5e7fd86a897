"""What a failure means for its operation."""

from __future__ import annotations

import pytest

from hostpassd import errors
from hostpassd.passthrough.outcome import Failure, Outcome, Then, bare, has_asked, is_over, outcome, with_more
from hostpassd.passthrough.steps import Detach, Reattach, Step, Unplug
from hostpassd.passthrough.waiting import StillAtIt

DETACH, ASK, BACK = Detach("a", "e1000e"), Unplug("a", "ua-a"), Reattach("a")
NOT_ASKED: list[Step] = [DETACH, BACK]
ASKED: list[Step] = [ASK, BACK]


@pytest.mark.parametrize(
    ("begun", "error", "away", "wanted"),
    [
        (NOT_ASKED, errors.HypervisorRefused("No."), False, Outcome(Then.UNDO, 2)),
        (NOT_ASKED, errors.Cancelled("No."), False, Outcome(Then.UNDO, 2)),
        (NOT_ASKED, RuntimeError("a fault"), False, Outcome(Then.UNDO, 2)),
        (NOT_ASKED, errors.HypervisorUnavailable("Away."), False, Outcome(Then.ON_RETURN, 2)),
        (NOT_ASKED, errors.HypervisorRefused("No."), True, Outcome(Then.ON_RETURN, 2)),
        (NOT_ASKED, StillAtIt("step"), False, Outcome(Then.AT_WORK, 2)),
        ([], errors.StateFolderError("Full."), False, Outcome(Then.UNDO, 0)),
        (ASKED, errors.GuestDidNotRelease("No."), False, Outcome(Then.STOP, 2)),
        (ASKED, errors.TimedOut("No."), True, Outcome(Then.STOP, 2)),
        (ASKED, errors.HypervisorRefused("No."), False, Outcome(Then.FINISH, 2)),
        (ASKED, errors.HypervisorUnavailable("Away."), False, Outcome(Then.ON_RETURN, 2)),
        ([DETACH, ASK], errors.HypervisorRefused("No."), False, Outcome(Then.UNDO, 1)),  # so nobody was asked
        ([ASK, ASK], errors.HypervisorRefused("No."), False, Outcome(Then.FINISH, 1)),
    ],
)
def test_what_becomes_of_it(begun: list[Step], error: Exception, away: bool, wanted: Outcome) -> None:
    assert outcome(begun, error, away=away) == wanted


def test_what_a_guest_was_asked_is_known_by_the_steps() -> None:
    assert has_asked(ASKED) and not has_asked(NOT_ASKED) and not has_asked([])


def test_what_a_guest_keeps_is_nothing_that_could_be_tried_again() -> None:
    kept, refused = Failure(ASK, errors.GuestDidNotRelease("No.")), Failure(DETACH, errors.HypervisorRefused("No."))
    assert is_over([]) and is_over([kept]) and not is_over([kept, refused])
    assert str(refused) == "free a from its host driver e1000e (No)"


def test_more_is_said_in_the_same_sentence_and_a_fault_keeps_its_own() -> None:
    told = with_more(errors.Cancelled("The job was cancelled."), "the guest can still let go")
    assert isinstance(told, errors.Cancelled) and str(told) == "The job was cancelled; the guest can still let go."
    fault = RuntimeError("a fault")
    assert with_more(fault, "more") is fault and bare(fault) == "a fault"
