"""One host for all tests, with hostpassd installed in it as a user would; what a failed test leaves behind."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.front import Front, Recording
from tests.lab.guest import Guest
from tests.lab.install import install
from tests.lab.machine import PATIENCE, Host
from tests.lab.repeat import end_watch, pytest_runtest_protocol, watch
from tests.roots import cache_folder

__all__ = ["pytest_runtest_protocol"]  # a hook that pytest finds here


@pytest.fixture(scope="session")
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The host, booted once, the daemon installed and running."""
    with Host() as booted:
        install(booted)
        watch(request.session, booted)
        yield booted
        end_watch(request.session)


@pytest.fixture(scope="session")
def front(host: Host) -> Iterator[Front]:
    """A client of hostpassd that is root."""
    client = Front(host)
    yield client
    client.close()


@pytest.fixture
def recording(host: Host) -> Iterator[Recording]:
    """What hostpassd signals during the test."""
    made = Recording(host)
    yield made
    made.close()


@pytest.fixture
def guest(host: Host) -> Iterator[Callable[..., Guest]]:
    """Makes machines, by name and what Guest takes; nothing of them is left."""
    with contextlib.ExitStack() as stack:

        def make(name: str, **what: Any) -> Guest:
            made = Guest(host, name, **what)
            stack.callback(made.clean_up)
            return made

        yield make


@pytest.hookimpl(hookwrapper=True)  # pytest 7.2, Debian 12's, has no other kind
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Lets the recorder see whether the test failed."""
    outcome = yield
    if outcome.get_result().failed:
        item.stash[FAILED] = True


FAILED = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def recorder(request: pytest.FixtureRequest) -> Iterator[None]:
    """Of a failed test: the journal, what the bus said and what udev said meanwhile, in the cache's lab-reports."""
    if "host" not in request.fixturenames:
        yield
        return
    host: Host = request.getfixturevalue("host")
    began = host.run("date '+%Y-%m-%d %H:%M:%S'").stdout.strip()
    taps = [
        ("bus.jsonl", host.open("exec python3 -B /opt/lab/record_bus.py org.hostpassd1")),
        ("udev.txt", host.open("udevadm monitor --udev --kernel --property & cat > /dev/null; kill $!")),
    ]
    yield
    told = {name: _end(process) for name, process in taps}
    if request.node.stash.get(FAILED, False):
        folder = cache_folder() / "lab-reports" / re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)
        _write(folder, {**told, "journal.txt": host.run(f"journalctl --since '{began}' --no-pager").stdout.encode()})


def _end(process: subprocess.Popen[bytes]) -> bytes:
    return process.communicate(timeout=PATIENCE)[0]


def _write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
