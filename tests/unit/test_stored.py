"""The watch on the stored configuration that others change."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from hostpassd.errors import NoSuchMachine
from hostpassd.machines.stored import StoredWatch, folder_of

PATIENCE = 10  # seconds


class Reads:
    """Stands for the hypervisor: what it was asked to read."""

    def __init__(self) -> None:
        self.tape: list[str] = []
        self._more = asyncio.Event()

    async def refresh(self) -> None:
        self._note("*")

    async def refresh_machine(self, uuid_or_name: str) -> None:
        uuid_or_name.encode()  # as libvirt's bindings do
        self._note(uuid_or_name)
        if uuid_or_name == "nobody":
            raise NoSuchMachine("nobody")

    def _note(self, what: str) -> None:
        self.tape.append(what)
        self._more.set()

    async def until(self, *wanted: str) -> None:
        """Returns when that, and nothing else, was read since the last call."""
        async with asyncio.timeout(PATIENCE):
            while self.tape[-1:] != [*wanted][-1:]:
                self._more.clear()
                await self._more.wait()
        assert self.tape == [*wanted]
        self.tape = []


@pytest.fixture
def reads() -> Reads:
    return Reads()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "libvirt" / "qemu"
    made.mkdir(parents=True)
    return made


@pytest.fixture
async def watched(reads: Reads, folder: Path) -> AsyncIterator[None]:
    watch = StoredWatch(reads, str(folder))
    yield
    watch.close()


def write(folder: Path, name: str | bytes, text: str = "") -> None:
    """As libvirt does it: under another name, and then renamed."""
    path = os.fsencode(folder) + b"/" + os.fsencode(name)
    with open(path + b".new", "w") as file:
        file.write(text)
    os.rename(path + b".new", path)


@pytest.mark.usefixtures("watched")
async def test_a_changed_file_has_its_machine_read_once(reads: Reads, folder: Path) -> None:
    for name in ("nobody.xml", "win 10.xml"):
        for text in ("a", "b"):
            write(folder, name, text)
    await reads.until("nobody", "win 10")
    (folder / "win 10.xml").unlink()
    await reads.until("win 10")


@pytest.mark.usefixtures("watched")
async def test_a_name_that_is_not_utf8_has_everything_read_and_the_next_its_machine(reads: Reads, folder: Path) -> None:
    write(folder, b"caf\xe9.xml")
    await reads.until("*")
    write(folder, b"caf\xe9.txt")
    write(folder, "web.xml")
    await reads.until("web")


def replaced(folder: Path) -> None:
    folder.rename(folder.with_name("old"))
    folder.mkdir()


def removed_and_made(folder: Path) -> None:
    folder.rmdir()
    folder.mkdir()


def another_put_in_its_place(folder: Path) -> None:
    other = folder.with_name("other")
    other.mkdir()
    other.rename(folder)


def the_one_above_replaced(folder: Path) -> None:
    folder.parent.rename(folder.parent.with_name("old"))
    folder.mkdir(parents=True)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize(
    "happens", [replaced, removed_and_made, another_put_in_its_place, the_one_above_replaced], ids=lambda f: f.__name__
)
async def test_whatever_becomes_of_the_folder_changes_in_it_are_seen(
    reads: Reads, folder: Path, happens: Callable[[Path], None]
) -> None:
    for _ in range(2):
        happens(folder)
        await reads.until("*")
        write(folder, "web.xml")
        await reads.until("web")
        (folder / "web.xml").unlink()
        await reads.until("web")
        for old in ("old", "other"):
            for place in (folder.with_name(old), folder.parent.with_name(old)):
                if place.exists():
                    place.rename(place.with_name(f"old-{os.urandom(4).hex()}"))


@pytest.mark.usefixtures("watched")
async def test_a_folder_that_is_gone_for_a_while_is_found_when_it_comes(reads: Reads, folder: Path) -> None:
    folder.rmdir()
    await reads.until("*")
    folder.parent.rmdir()
    await reads.until("*")
    folder.parent.mkdir()
    await reads.until("*")
    folder.mkdir()
    await reads.until("*")
    write(folder, "web.xml")
    await reads.until("web")


async def test_a_folder_that_is_made_after_the_start_is_watched_from_then_on(reads: Reads, tmp_path: Path) -> None:
    folder = tmp_path / "etc" / "libvirt" / "qemu"
    watch = StoredWatch(reads, str(folder))
    folder.mkdir(parents=True)
    await reads.until("*")
    write(folder, "web.xml")
    await reads.until("web")
    watch.close()


def test_the_folder_is_that_of_the_hypervisor() -> None:
    assert folder_of("qemu:///system?socket=/x") == "/etc/libvirt/qemu"
    assert folder_of("test:///default") is None
