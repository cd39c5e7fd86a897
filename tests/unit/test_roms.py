"""Which files a caller may name as a device's ROM: those below a few folders, without a way out of them."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

from hostpassd import errors
from hostpassd.bus.roms import RomFiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of ROMs, and beside it what is none."""
    roms = tmp_path / "roms"
    (roms / "vendor").mkdir(parents=True)
    for file in (roms / "vendor/card.rom", tmp_path / "secret", tmp_path / "roms-2"):
        file.write_bytes(b"\x55\xaa")
    (roms / "inside").symlink_to("vendor/card.rom")
    (roms / "out").symlink_to(tmp_path / "secret")
    (roms / "away").symlink_to(tmp_path)
    (roms / "nowhere").symlink_to("nothing")
    (roms / "circle").symlink_to("circle")
    (roms / "line\nbreak").write_bytes(b"")
    os.mkfifo(roms / "pipe")
    return roms


@pytest.mark.parametrize("text", ["vendor/card.rom", "inside"])
async def test_a_file_below_the_folder_is_found_and_links_in_its_path_are_gone(folder: Path, text: str) -> None:
    assert await RomFiles([str(folder)]).find(f"{folder}/{text}") == f"{folder}/vendor/card.rom"


async def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert await RomFiles([str(link)]).find(f"{link}/inside") == f"{folder}/vendor/card.rom"


IN_FOLDER = ["out", "away/secret", "away/roms/vendor", "nowhere", "circle", "line\nbreak", "pipe", "vendor", "missing"]


@pytest.mark.parametrize("text", IN_FOLDER)
async def test_what_leads_out_or_is_no_file_is_refused(folder: Path, text: str) -> None:
    with pytest.raises(errors.InvalidOption, match="rom-file"):
        await RomFiles([str(folder)]).find(f"{folder}/{text}")


class Looks:
    """os.path.realpath, seen through: which paths which threads follow, and whether it answers."""

    def __init__(self) -> None:
        self.at: list[str] = []
        self.threads: set[str] = set()
        self.answers = threading.Event()
        self.answers.set()
        self.hangs_below = ""
        self._realpath = os.path.realpath

    def __call__(self, path: str, *, strict: bool = False) -> str:
        self.at.append(path)
        self.threads.add(threading.current_thread().name)
        if path.startswith(self.hangs_below):
            self.answers.wait()
        return self._realpath(path, strict=strict)


@pytest.fixture
def looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Looks:
    made = Looks()
    monkeypatch.setattr(os.path, "realpath", made)
    return made


ELSEWHERE = [
    "{}",
    "{}/",
    "{}/../secret",
    "{}/vendor/../../secret",
    "{}/vendor//card.rom",
    "{}/./inside",
    "{}-2",
    "/{}/inside",
    "inside",
    "",
    "/etc/hostname",
    "/usr/share",
    "/usr/share/../../etc/hostname",
    "{}/" + "a/" * 300 + "b",
]


@pytest.mark.parametrize("text", ELSEWHERE)
async def test_a_text_that_is_not_below_the_folder_by_its_words_is_not_followed(
    folder: Path, text: str, looks: Looks
) -> None:
    with pytest.raises(errors.InvalidOption, match="rom-file"):
        await RomFiles([str(folder)]).find(text.format(folder))
    assert looks.at == []


async def test_what_hangs_costs_one_look_in_one_thread_and_nobody_waits_for_it_for_long(
    folder: Path, looks: Looks, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = f"{folder}/inside"
    roms = RomFiles([str(folder)])
    elsewhere = "/usr/share/common-licenses/GPL-3"
    looks.answers.clear()
    with monkeypatch.context() as soon:
        soon.setattr("hostpassd.bus.roms.PATIENCE", 0.01)
        for _ in range(3):
            with pytest.raises(errors.TimedOut, match="does not answer"):
                await roms.find(file)
    looks.hangs_below = str(folder)
    assert await roms.find(elsewhere) == elsewhere  # nobody waits for another folder's
    looks.answers.set()
    found = ""
    while not found:
        try:
            found = await roms.find(file)
        except errors.TimedOut:
            await asyncio.sleep(0)
    assert found == f"{folder}/vendor/card.rom"
    assert looks.at.count(file) == 2 and looks.threads == {"rom-files"}
