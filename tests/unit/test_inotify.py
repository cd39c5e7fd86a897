"""Watching a folder by inotify."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest

from hostpassd.machines.inotify import Watch

PATIENCE = 10  # seconds


class Heard:
    """What a watch's callback was given."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[set[str]] = asyncio.Queue()

    def __call__(self, names: set[str]) -> None:
        self.queue.put_nowait(names)

    async def next(self) -> set[str]:
        return await asyncio.wait_for(self.queue.get(), PATIENCE)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_the_names_of_what_came_was_written_and_went(tmp_path: Path) -> None:
    heard = Heard()
    watch = Watch(str(tmp_path), heard)
    (tmp_path / "one").write_text("x")
    (tmp_path / "two").mkdir()
    assert await heard.next() == {"one", "two"}
    (tmp_path / "one").rename(tmp_path / "three")
    (tmp_path / "two").rmdir()
    assert await heard.next() == {"two", "three"}
    watch.close()


async def test_a_watch_gives_its_descriptor_back(tmp_path: Path) -> None:
    before = descriptors()
    for place in (tmp_path, tmp_path / "none"):
        watch = Watch(str(place), Heard())
        assert descriptors() == before + 1
        watch.close()
        watch.close()
        assert descriptors() == before


async def test_a_folder_replaced_over_and_over_costs_one_descriptor(tmp_path: Path) -> None:
    heard, folder = Heard(), tmp_path / "folder"
    folder.mkdir()
    before = descriptors()
    watch = Watch(str(folder), heard)
    for _ in range(20):
        folder.rmdir()
        folder.mkdir()
        assert await heard.next() == set()
    assert descriptors() == before + 1
    watch.close()


async def test_when_the_queue_runs_over_everything_is_to_be_looked_at(tmp_path: Path) -> None:
    heard = Heard()
    watch = Watch(str(tmp_path), heard)
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    names = [os.fspath(tmp_path / name) for name in ("a", "b")]
    for _ in range(limit // 4 + 1):  # each of them comes and goes
        for name in names:
            os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
            os.unlink(name)
    while await heard.next():
        pass
    watch.close()


async def test_where_there_is_no_room_for_a_watch_it_is_told_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        watch = Watch(str(tmp_path), heard, retry=0.0)
        for _ in range(3):
            assert await heard.next() == set()  # look at everything: the watch tells nothing
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path) in caplog.text
    while await heard.next() != {"file"}:  # the last time that it says to look at everything, it watches
        (tmp_path / "file").write_text("x")
    watch.close()
