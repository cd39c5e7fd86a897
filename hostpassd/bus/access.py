"""Whether a caller may: polkit's answer, or without polkit that of the user id.

1. Each device is asked about by itself and without interaction, so that rules can tell devices apart, and whoever needs
   no prompt waits for none. A plain no refuses all.
2. Where polkit wants an authentication for some of them, the caller is asked in one prompt for each action.
3. A prompt takes one of the places for prompts as long as it is open, or is refused at once.
4. A caller that leaves the bus takes its checks and prompts along.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import unicodedata
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from hostpassd import names
from hostpassd.base.tasks import first
from hostpassd.bus.router import BusCallError, Call, Router, Variant
from hostpassd.errors import Cancelled, InteractiveAuthorizationRequired, LimitExceeded, NotAuthorized
from hostpassd.model.events import Event, ProblemChanged
from hostpassd.passthrough.permission import Check

POLKIT = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY = "org.freedesktop.PolicyKit1.Authority"

# Seconds for an answer that needs no person, and for one that does.
TIMEOUT = 25.0
PROMPT_TIMEOUT = 300.0

# The bus lets us wait for 128 answers. Those that need no person have places of their own, which are waited for so many
# seconds. Nobody has many of them, or whoever asks for much would keep all others waiting.
QUIET_PLACES = 24
QUIET_PLACES_PER_PERSON = 6
PLACE_TIMEOUT = 25.0

# Of one list, less than a person's places: whatever else they do has some, too.
ROWS_AT_ONCE = 4

# Prompts have the others, and wait for none. Nobody has many prompts open. While few places are left, only those who
# have none open get one: to use up all places takes dozens of accounts.
PROMPTS = 96
PROMPTS_PER_PERSON = 8
PROMPTS_FOR_NEWCOMERS = 32

# Who has a range of user ids of their own (subuid(5)) is one person with all of these.
SUBUIDS = Path("/etc/subuid")

# What the bus says when polkit is not there and cannot be started.
ABSENT = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.systemd1.",  # systemd, asked by the bus to start it: masked, not installed
)

POLICY_FILE = "/usr/share/polkit-1/actions/org.hostpassd1.policy"
NOT_REGISTERED = "is not registered"

# Characters of a detail: of what devices and machines call themselves, and of the names of all devices of a plan.
CLAIM_LIMIT = 256
DETAIL_LIMIT = 4096
CLAIMS = frozenset({"device.label", "device.serial", "machine.name"})


class _NoAnswer(NotAuthorized):
    """polkit does not say whether."""


class Access:
    """Asks polkit about callers, through ROUTER. EMIT is told when polkit turns out not to be there, or to be back."""

    def __init__(self, router: Router, emit: Callable[[Event], None], *, log: logging.Logger) -> None:
        self._router = router
        self._emit = emit
        self._is_absent = False
        self._log = log
        self._quiet = asyncio.Semaphore(QUIET_PLACES)
        self._quiet_of: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()  # by person
        self.prompts: Counter[str] = Counter()  # open ones, by person
        self._numbers = itertools.count(1)
        self._troubles: set[tuple[str, str]] = set()  # logged, by action, since polkit answered last about it

    async def check(self, call: Call, checks: Sequence[Check]) -> None:
        """Returns if the caller may do all of CHECKS.

        Raises NotAuthorized if not, InteractiveAuthorizationRequired if a prompt would be needed that the caller did
        not allow, LimitExceeded if there is no place for one, Cancelled if the caller vanishes meanwhile.
        """
        shown = [_as_asked(check) for check in checks]
        async with self._router.vanished(call.sender) as gone:
            await _unless(gone, self._check(call, shown))

    async def would(self, call: Call, checks: Sequence[Check]) -> str:
        """What `check` would come to, without a prompt: yes, challenge (a prompt would be needed) or no."""
        [answer] = await self.would_each(call, [checks])
        return answer

    async def would_each(self, call: Call, rows: Sequence[Sequence[Check]]) -> list[str]:
        """What `check` of each of ROWS would come to, as `would` tells it; some are asked about at once.

        Once polkit does not answer, all that have no answer yet are "no": nobody waits for each of thousands.
        """
        answers = ["no"] * len(rows)
        async with self._router.vanished(call.sender) as gone:
            await _unless(gone, self._would_each(call, rows, answers))
        return answers

    async def _would_each(self, call: Call, rows: Sequence[Sequence[Check]], answers: list[str]) -> None:
        person = await _person(await self._router.uid_of(call.sender))
        left = iter(enumerate(rows))

        async def ask() -> None:
            for index, checks in left:
                answers[index] = await self._would(call, person, checks)

        asking = [asyncio.create_task(ask()) for _ in rows[:ROWS_AT_ONCE]]
        try:
            await asyncio.gather(*asking)
        except _NoAnswer:
            pass
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    async def _would(self, call: Call, person: str, checks: Sequence[Check]) -> str:
        """Raises _NoAnswer."""
        try:
            wanted = [await self._wants_authentication(call, person, *_as_asked(check)) for check in checks]
        except _NoAnswer:
            raise
        except NotAuthorized:
            return "no"
        return "challenge" if any(wanted) else "yes"

    async def _check(self, call: Call, checks: Sequence[Check]) -> None:
        person = await _person(await self._router.uid_of(call.sender))
        wanted = [check for check in checks if await self._wants_authentication(call, person, *check)]
        if not wanted:
            return
        if not call.interactive:
            raise InteractiveAuthorizationRequired(
                f"{wanted[0][0]} takes an administrator's authentication: allow interactive authorization in the call."
            )
        async with self._place_for_prompt(person):
            for action in dict.fromkeys(action for action, _ in wanted):
                await self._prompt(call, action, _together([row for other, row in wanted if other == action]))

    async def _wants_authentication(self, call: Call, person: str, action: str, details: Mapping[str, str]) -> bool:
        """Whether the caller may do ACTION after an authentication only. Raises NotAuthorized if not at all."""
        try:
            async with self._quiet_place(person), asyncio.timeout(TIMEOUT):
                authorized, challenge, _ = await self.ask(call, action, details, interactive=False)
        except TimeoutError:
            raise _NoAnswer("polkit does not answer: ask the administrator to restart it.") from None
        except BusCallError as error:
            await self._without_answer(call, action, error)
            return False
        if not (authorized or challenge):
            raise NotAuthorized(f"polkit's rules do not let you do {action}: ask the administrator of this host.")
        return not authorized

    async def _prompt(self, call: Call, action: str, details: Mapping[str, str]) -> None:
        """Returns when the caller has been authenticated for ACTION. Raises NotAuthorized if it is not."""
        try:
            async with asyncio.timeout(PROMPT_TIMEOUT):
                authorized, challenge, answer = await self.ask(call, action, details, interactive=True)
        except TimeoutError:
            minutes = f"{PROMPT_TIMEOUT / 60:g} minutes"
            raise NotAuthorized(
                f"Nobody answered for {action} within {minutes}: call again to be asked again."
            ) from None
        except BusCallError as error:
            await self._without_answer(call, action, error)
            return
        if not authorized:
            raise _refusal(action, challenge, answer)

    @contextlib.asynccontextmanager
    async def _quiet_place(self, person: str) -> AsyncIterator[None]:
        """One of PERSON's places first, then one of all: in the line for those nobody stands more than a few times."""
        own = self._quiet_of.setdefault(person, asyncio.Semaphore(QUIET_PLACES_PER_PERSON))
        async with contextlib.AsyncExitStack() as places:
            try:
                async with asyncio.timeout(PLACE_TIMEOUT):
                    await places.enter_async_context(own)
                    await places.enter_async_context(self._quiet)
            except TimeoutError:
                raise LimitExceeded("polkit is being asked too much at the moment: try again in a minute.") from None
            yield

    @contextlib.asynccontextmanager
    async def _place_for_prompt(self, person: str) -> AsyncIterator[None]:
        own, left = self.prompts[person], PROMPTS - self.prompts.total()
        if own >= PROMPTS_PER_PERSON:
            raise LimitExceeded(f"You have {own} prompts open: answer some of them first.")
        if left <= (PROMPTS_FOR_NEWCOMERS if own else 0):
            raise LimitExceeded("Too many prompts are open on this host: try again in some minutes.")
        self.prompts[person] += 1
        try:
            yield
        finally:
            self.prompts[person] -= 1
            if not self.prompts[person]:
                del self.prompts[person]

    async def ask(
        self, call: Call, action: str, details: Mapping[str, str], *, interactive: bool
    ) -> tuple[bool, bool, dict[str, str]]:
        """polkit's answer: authorized, a challenge would be needed, more about it."""
        number = f"hostpassd-{next(self._numbers)}"
        subject = ["system-bus-name", {"name": Variant("s", call.sender)}]
        body = [subject, action, details, int(interactive), number]
        try:
            [[authorized, challenge, answer]] = await self._router.call(
                POLKIT, AUTHORITY_PATH, AUTHORITY, "CheckAuthorization", "(sa{sv})sa{ss}us", body, timeout=None
            )
        except asyncio.CancelledError:
            self._router.tell(POLKIT, AUTHORITY_PATH, AUTHORITY, "CancelCheckAuthorization", "s", [number])
            raise
        self._note_absence(absent=False)
        self._troubles = {trouble for trouble in self._troubles if trouble[0] != action}
        return authorized, challenge, answer

    async def _without_answer(self, call: Call, action: str, error: BusCallError) -> None:
        self._note_absence(absent=error.name.startswith(ABSENT))
        if error.name.startswith(ABSENT):
            if await self._router.uid_of(call.sender) == 0:
                return
            raise _NoAnswer("polkit is not here, so only root may do this: have polkit installed and started.")
        # Once: anybody can have it said as often as they like.
        if (action, error.name) not in self._troubles:
            self._troubles.add((action, error.name))
            if NOT_REGISTERED in error.message:
                self._log.error("polkit does not know %s: %s is missing or broken", action, POLICY_FILE)
            else:
                self._log.error("polkit cannot say who may do %s: %s", action, error)
        raise _NoAnswer("polkit cannot say whether you may do this: the log of hostpassd has the reason.")

    def _note_absence(self, *, absent: bool) -> None:
        if absent != self._is_absent:
            self._is_absent = absent
            self._emit(ProblemChanged("no-polkit", absent))


async def _unless(gone: asyncio.Event, checking: Coroutine[Any, Any, None]) -> None:
    """Does CHECKING, but no longer than the caller is there: raises Cancelled once it is GONE."""
    work = asyncio.create_task(checking)
    try:
        await first(work, over=gone)
    finally:
        work.cancel()
        await asyncio.wait({work})
    if gone.is_set():
        raise Cancelled("The caller is gone.")
    work.result()


def _refusal(action: str, challenge: bool, answer: Mapping[str, str]) -> NotAuthorized:
    if "polkit.dismissed" in answer:
        return NotAuthorized(f"The authentication for {action} was dismissed: call again to be asked again.")
    if challenge:
        return NotAuthorized(f"Nobody was authenticated for {action}: run an authentication agent in your session.")
    return NotAuthorized(f"polkit's rules do not let you do {action}: ask the administrator of this host.")


async def _person(uid: int) -> str:
    """Whose checks and prompts those of UID count as."""
    owner = await asyncio.to_thread(_owner_of_range, uid)
    return f"range of {owner}" if owner else f"user {uid}"


def _owner_of_range(uid: int) -> str:
    """Whose range of user ids UID is in, '' if it is in none."""
    try:
        lines = SUBUIDS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for owner, start, count in (line.split(":") for line in lines if line.count(":") == 2):
        if start.isdecimal() and count.isdecimal() and int(start) <= uid < int(start) + int(count):
            return owner
    return ""


def _together(rows: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The details of one prompt for several devices: of each, what the devices have, in their order."""
    if len(rows) == 1:
        return dict(rows[0])
    joined = {
        key: ("; " if key == "device.label" else " ").join(dict.fromkeys(row[key] for row in rows if row[key]))
        for key in rows[0]
    }
    return {key: _within(text, DETAIL_LIMIT) for key, text in joined.items()}


def _as_asked(check: Check) -> Check:
    """CHECK as polkit gets it."""
    action, details = check
    return names.action_id(action), {key: _shown(key, text) for key, text in details.items()}


def _shown(key: str, text: str) -> str:
    """TEXT as rules and prompts get it: what could deceive a reader is marked.

    Not left out: two machines must not come to one name for a rule because one has signs in it that nobody sees. No
    quotes, as those in the prompts are the only ones.
    """
    limit = CLAIM_LIMIT if key in CLAIMS else DETAIL_LIMIT
    fit = "".join(char if _is_harmless(char) else "\N{REPLACEMENT CHARACTER}" for char in text[:limit])
    return _within(fit if len(text) <= limit else fit + " ", limit)


def _within(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _is_harmless(char: str) -> bool:
    category = unicodedata.category(char)
    return char == " " or (category[0] in "LMNPS" and category not in ("Pi", "Pf") and char not in _QUOTES)


# What looks like a quote, besides Unicode's initial and final ones.
_QUOTES = frozenset('"\u201a\u201e\u2033\u2036\u02ba\u02dd\u02ee\u05f4\u275d\u275e\u301d\u301e\u301f\uff02\u3003')
