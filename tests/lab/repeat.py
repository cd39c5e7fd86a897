"""The host is an emulated machine, and the emulator itself can restart it in the middle of a test, without a word.

A test during which that happened says nothing about hostpassd. It is run once more, on a new host. That happens three
times at most: the fourth ends the tests. (Twice the console told of a corrupted stack in the kernel's KVM, which the
nested guests run on.) A host that no longer answers is a failure like any other, after which no test is begun.
"""

from __future__ import annotations

import contextlib

import pytest
from _pytest.runner import runtestprotocol

from tests.lab.machine import Host

HOST = pytest.StashKey[Host]()
RESTARTS = pytest.StashKey[int]()
LIMIT = 3
END = pytest.StashKey[str]()  # what had become of the last host when its tests were over


def watch(session: pytest.Session, host: Host) -> None:
    """From now on, HOST is what the session's tests run on."""
    session.stash[HOST] = host
    session.stash[END] = ""


def end_watch(session: pytest.Session) -> None:
    """The host is about to be closed, which comes before the last test's reports."""
    if HOST in session.stash:
        session.stash[END] = session.stash[HOST].lost()
        del session.stash[HOST]


@pytest.hookimpl(tryfirst=True)  # type: ignore[untyped-decorator, unused-ignore]
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Runs the test, and once more if the host restarted meanwhile."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = _reports(item, nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _reports(item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
    while True:
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        why = _lost(item.session) if any(report.failed for report in reports) else ""
        if not why:
            return reports
        _say(item, f"\n{item.nodeid}: {why}")
        _take_down(item)
        restarts = item.session.stash[RESTARTS] = item.session.stash.get(RESTARTS, 0) + 1
        if "restarted" not in why or restarts > LIMIT:
            item.session.shouldfail = f"the lab's host was lost during {item.nodeid}"
            return reports


def _lost(session: pytest.Session) -> str:
    """What became of the host; '' where it is there as before."""
    host = session.stash.get(HOST, None)
    return session.stash.get(END, "") if host is None else host.lost()


def _take_down(item: pytest.Item) -> None:
    """Ends every fixture, the host's own too; the next test sets them up anew."""
    if HOST in item.session.stash:
        del item.session.stash[HOST]
    # What spoke to the lost host is closed by the collector, in the middle of whatever test is on then.
    item.config.addinivalue_line("filterwarnings", "ignore::ResourceWarning")
    with contextlib.suppress(Exception):  # most of them want to tidy up on a host that is no longer there
        item.session._setupstate.teardown_exact(None)


def _say(item: pytest.Item, text: str) -> None:
    if reporter := item.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(text)
