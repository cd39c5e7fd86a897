"""The option rom-file: which paths are looked up at all, and which of those are taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hostpassd import errors
from hostpassd.bus import romfile


@pytest.fixture
def folder(tmp_path: Path) -> str:
    inside = tmp_path / "roms"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep/a.rom").write_bytes(b"\x55\xaa")
    (inside / "link.rom").symlink_to("deep/a.rom")
    (tmp_path / "outside").write_bytes(b"")
    (inside / "out.rom").symlink_to("../outside")
    (inside / "away").symlink_to("/etc")
    os.mkfifo(inside / "pipe")
    return str(inside)


@pytest.mark.parametrize("name", ["deep/a.rom", "link.rom"])
async def test_a_file_below_a_folder_is_taken(folder: str, name: str) -> None:
    await romfile.check(f"{folder}/{name}", ("/usr/share", folder))


@pytest.mark.parametrize(
    "name",
    ["", "deep", "none", "out.rom", "away/hostname", "pipe", "deep/../deep/a.rom", "deep//a.rom", "./link.rom", "a\nb"],
)
async def test_anything_else_is_not(folder: str, name: str) -> None:
    with pytest.raises(errors.InvalidOption, match=f"below /usr/share or {folder}"):
        await romfile.check(f"{folder}/{name}", ("/usr/share", folder))


@pytest.mark.parametrize("path", ["/etc/passwd", "relative", "/usr/share", "/usr/shared/x", "//usr/share/x", "~/x"])
async def test_what_is_elsewhere_is_not_even_looked_at(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(romfile, "_is_below", lambda *_: pytest.fail("looked at"))
    with pytest.raises(errors.InvalidOption):
        await romfile.check(path, ("/usr/share",))


async def test_a_folder_may_be_a_link_itself(folder: str, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(folder)
    await romfile.check(f"{tmp_path}/other/deep/a.rom", (f"{tmp_path}/other",))


async def test_a_file_system_that_hangs_is_waited_for_only_so_long(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    monkeypatch.setattr(romfile, "_is_below", lambda *_: os.read(reading, 1))
    monkeypatch.setattr(romfile, "_PATIENCE", 0.01)
    with pytest.raises(errors.TimedOut, match="does not answer"):
        await romfile.check(f"{folder}/deep/a.rom", (folder,))
    os.close(writing)
