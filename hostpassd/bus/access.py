"""Whether a caller may: polkit's answer, or without polkit that of the user id."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any

from hostpassd.bus.router import BusCallError, Call, Router, Variant
from hostpassd.errors import Cancelled, InteractiveAuthorizationRequired, LimitExceeded, NotAuthorized
from hostpassd.host.device import clean

POLKIT = "org.freedesktop.PolicyKit1"
AUTHORITY_PATH = "/org/freedesktop/PolicyKit1/Authority"
AUTHORITY = "org.freedesktop.PolicyKit1.Authority"

# Seconds for an answer that needs no person.
TIMEOUT = 25.0

# The bus lets us wait for 128 answers. Prompts can stay open for as long as nobody answers them, so they have places of
# their own, by whether the caller allows a prompt, and one user has only some of them.
PLACES = {False: 24, True: 96}
PLACES_PER_USER = 16

# What the bus says when polkit is not there and cannot be started.
ABSENT = (
    "org.freedesktop.DBus.Error.ServiceUnknown",
    "org.freedesktop.DBus.Error.NameHasNoOwner",
    "org.freedesktop.DBus.Error.Spawn.",
    "org.freedesktop.systemd1.",  # systemd, asked by the bus to start it: masked, not installed
)

POLICY_FILE = "/usr/share/polkit-1/actions/org.hostpassd1.policy"
NOT_REGISTERED = "is not registered"


class Access:
    """Asks polkit about callers, through ROUTER."""

    def __init__(self, router: Router, *, log: logging.Logger) -> None:
        self._router = router
        self._log = log
        self._places = {interactive: asyncio.Semaphore(count) for interactive, count in PLACES.items()}
        self._asking: Counter[int] = Counter()  # by user id
        self._numbers = itertools.count(1)

    async def check(self, call: Call, action: str, details: Mapping[str, str]) -> None:
        """Returns if the caller may do ACTION; DETAILS are for the prompt and the administrator's rules.

        Raises NotAuthorized if not, InteractiveAuthorizationRequired if a prompt would be needed that the caller did
        not allow, Cancelled if the caller vanishes meanwhile, LimitExceeded if its user asks too often at once.
        """
        shown = {key: clean(value) for key, value in details.items()}
        async with self._turn(call), self._router.vanished(call.sender) as gone:
            await _unless(gone, self._check(call, action, shown))

    @contextlib.asynccontextmanager
    async def _turn(self, call: Call) -> AsyncIterator[None]:
        """Keeps one user from taking all places for prompts."""
        uid = await self._router.uid_of(call.sender) if call.interactive else -1
        if self._asking[uid] >= PLACES_PER_USER:
            raise LimitExceeded(f"You have {PLACES_PER_USER} prompts open: answer some of them first.")
        self._asking[uid] += call.interactive
        try:
            yield
        finally:
            self._asking[uid] -= call.interactive
            if not self._asking[uid]:
                del self._asking[uid]

    async def _check(self, call: Call, action: str, details: Mapping[str, str]) -> None:
        async with self._places[call.interactive]:
            try:
                authorized, challenge, answer = await self._ask(call, action, details)
            except TimeoutError:
                raise NotAuthorized("polkit does not answer: ask the administrator to restart it.") from None
            except BusCallError as error:
                await self._without_answer(call, action, error)
                return
        if not authorized:
            raise _refusal(call, action, challenge, answer)

    async def would(self, call: Call, action: str, details: Mapping[str, str]) -> str:
        """What `check` would come to, without a prompt: yes, challenge (a prompt would be needed) or no."""
        quiet = dataclasses.replace(call, interactive=False)
        try:
            await self.check(quiet, action, details)
        except InteractiveAuthorizationRequired:
            return "challenge"
        except NotAuthorized:
            return "no"
        return "yes"

    async def _ask(self, call: Call, action: str, details: Mapping[str, str]) -> tuple[bool, bool, dict[str, str]]:
        """polkit's answer: authorized, a challenge would be needed, more about it."""
        number = f"hostpassd-{next(self._numbers)}"
        subject = ["system-bus-name", {"name": Variant("s", call.sender)}]
        body = [subject, action, details, int(call.interactive), number]
        timeout = None if call.interactive else TIMEOUT
        try:
            [[authorized, challenge, answer]] = await self._router.call(
                POLKIT, AUTHORITY_PATH, AUTHORITY, "CheckAuthorization", "(sa{sv})sa{ss}us", body, timeout=timeout
            )
        except (TimeoutError, asyncio.CancelledError):
            self._router.tell(POLKIT, AUTHORITY_PATH, AUTHORITY, "CancelCheckAuthorization", "s", [number])
            raise
        return authorized, challenge, answer

    async def _without_answer(self, call: Call, action: str, error: BusCallError) -> None:
        if error.name.startswith(ABSENT):
            if await self._router.uid_of(call.sender) == 0:
                return
            raise NotAuthorized("polkit is not here, so only root may do this: have polkit installed and started.")
        if NOT_REGISTERED in error.message:
            self._log.error("polkit does not know %s: %s is missing or broken", action, POLICY_FILE)
        else:
            self._log.error("polkit cannot say who may do %s: %s", action, error)
        raise NotAuthorized("polkit cannot say whether you may do this: the log of hostpassd has the reason.")


async def _unless(gone: asyncio.Event, checking: Coroutine[Any, Any, None]) -> None:
    """Does CHECKING, but no longer than the caller is there: raises Cancelled once it is GONE."""
    work, leaving = asyncio.create_task(checking), asyncio.create_task(gone.wait())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        work.cancel()
        await asyncio.wait({work, leaving})
    if gone.is_set():
        raise Cancelled("The caller is gone.")
    work.result()


def _refusal(
    call: Call, action: str, challenge: bool, answer: Mapping[str, str]
) -> NotAuthorized | InteractiveAuthorizationRequired:
    if challenge and not call.interactive:
        return InteractiveAuthorizationRequired(
            f"{action} takes an administrator's authentication: allow interactive authorization in the call."
        )
    if "polkit.dismissed" in answer:
        return NotAuthorized(f"The authentication for {action} was dismissed: call again to be asked again.")
    if challenge:
        return NotAuthorized(f"Nobody was authenticated for {action}: run an authentication agent in your session.")
    return NotAuthorized(f"polkit's rules do not let you do {action}: ask the administrator of this host.")
