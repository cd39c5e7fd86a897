"""Blocking reads off the loop: one that hangs costs its file, and nothing else."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hostpassd.host import reading
from hostpassd.host.reading import Files, Hung, Reader


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PATIENCE", 0.1)
    monkeypatch.setattr(reading, "_LOOK", 0.02)


@pytest.fixture
def hanging(tmp_path: Path) -> Callable[[str], Path]:
    """Makes files that hang whoever opens them."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        os.mkfifo(path)
        return path

    return make


class Told:
    """What a Reader tells, and a wait for it."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self._news = asyncio.Event()

    def __call__(self, files: tuple[str, ...]) -> None:
        self.told.append(files)
        self._news.set()

    async def next(self) -> tuple[str, ...]:
        await asyncio.wait_for(self._news.wait(), 20)
        self._news.clear()
        return self.told[-1]


def reads(*files: Path) -> Callable[[Files], list[bytes | int | None]]:
    """A job: the content of each file, or its error's number."""

    def job(handle: Files) -> list[bytes | int | None]:
        found: list[bytes | int | None] = []
        for file in files:
            try:
                found += handle.read(str(file), (0, 100))
            except OSError as error:
                found.append(error.errno)
        return found

    return job


def answer(path: Path) -> None:
    """Lets whoever hangs at PATH go on."""
    os.close(os.open(path, os.O_WRONLY))


async def test_a_file_that_hangs_is_given_up_and_read_again_when_it_answers(
    hanging: Callable[[str], Path], tmp_path: Path
) -> None:
    bad, good = hanging("bad"), tmp_path / "good"
    good.write_bytes(b"fine")
    told = Told()
    reader = Reader(told)
    with pytest.raises(Hung):
        await reader.run(reads(good, bad))
    assert told.told == [(str(bad),)]
    assert await reader.run(reads(bad, good)) == [errno.ETIMEDOUT, b"fine"]
    told._news.clear()
    await asyncio.to_thread(answer, bad)
    assert await told.next() == ()
    bad.unlink()
    bad.write_bytes(b"well again")
    assert await reader.run(reads(bad)) == [b"well again"]


async def test_of_a_name_that_hangs_at_many_devices_no_more_are_tried(
    hanging: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader()
    monkeypatch.setattr(reading, "_LIMIT", 3)
    files = [hanging(f"{number}/wwid") for number in range(6)]
    hung = 0
    while True:
        try:
            found = await reader.run(reads(*files))
            break
        except Hung:
            hung += 1
    assert hung == 3 and found == [errno.ETIMEDOUT] * 6
    for file in files[:3]:
        await asyncio.to_thread(answer, file)


async def test_what_a_job_that_was_given_up_goes_on_to_do_is_nothing(hanging: Callable[[str], Path]) -> None:
    bad = hanging("bad")
    done: list[str] = []
    told = Told()
    reader = Reader(told)

    def job(files: Files) -> None:
        files.read(str(bad), (0, 1))
        done.append("more")

    with pytest.raises(Hung):
        await reader.run(job)
    told._news.clear()
    await asyncio.to_thread(answer, bad)
    assert await told.next() == () and done == []


async def test_what_a_job_raises_is_raised() -> None:
    def job(files: Files) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await Reader().run(job)
