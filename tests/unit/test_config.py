"""The configuration file: what it sets, and what is said of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostpassd.config import Config, ConfigError, load

GOOD = """
hypervisors = ["qemu:///system", "xen:///system"]
excluded-classes = ["07", "0C05"]
never = ["pci_0000_01_00_0"]
timeout = 60
rom-folders = ["/srv/roms", "/"]
"""

# What is wrong, the line that is named, and what is said.
WRONG = {
    "timeout = 0": (1, "from 1 to 3600"),
    "\ntimeout = true": (2, "from 1 to 3600"),
    "colour = 'red'": (1, "the settings are hypervisors"),
    "hypervisors = []": (1, "name at least one"),
    "\n\nhypervisors = ['']": (3, "name at least one"),
    "hypervisors = 'qemu:///system'": (1, "a list of strings"),
    "excluded-classes = ['7']": (1, "two or four hexadecimal digits"),
    "never = ['0000:01:00.0']": (1, "as the tree has them"),
    "rom-folders = '/srv'": (1, "a list of strings"),
    "rom-folders = ['roms']": (1, "absolute paths"),
    "rom-folders = ['/srv/../etc']": (1, "absolute paths"),
    "rom-folders = ['/srv/roms/']": (1, "absolute paths"),
    "rom-folders = ['//srv']": (1, "absolute paths"),
    "rom-folders = ['']": (1, "absolute paths"),
    "timeout = 1\nnever = [": (2, "not valid TOML"),
}


def written(folder: Path, text: str) -> Path:
    path = folder / "hostpassd.toml"
    path.write_text(text)
    return path


def test_without_a_file_there_are_defaults(tmp_path: Path) -> None:
    assert load(tmp_path / "hostpassd.toml") == Config()


def test_every_setting_is_read(tmp_path: Path) -> None:
    found = load(written(tmp_path, GOOD))
    assert found == Config(
        hypervisors=("qemu:///system", "xen:///system"),
        excluded_classes=("07", "0c05"),
        never=frozenset({"pci_0000_01_00_0"}),
        timeout=60,
        rom_folders=("/srv/roms", "/"),
    )


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_told_with_the_file_and_the_line(tmp_path: Path, text: str) -> None:
    line, words = WRONG[text]
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in str(caught.value) and f"line {line}" in str(caught.value) and words in str(caught.value)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "hostpassd.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(path)
