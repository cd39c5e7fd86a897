"""/etc/hostpassd/hostpassd.toml: what an administrator can set."""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from hostpassd.state.eligibility import EXCLUDED_CLASSES

DEFAULT_PATH = Path("/etc/hostpassd/hostpassd.toml")


class ConfigError(Exception):
    """The configuration file cannot be used; the message says the file, the line or key, and what to do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """All settings, with their defaults."""

    hypervisors: tuple[str, ...] = ("qemu:///system",)
    excluded_classes: tuple[str, ...] = EXCLUDED_CLASSES  # PCI base classes (07) or class and subclass (0c05)
    never: frozenset[str] = frozenset()  # device names never to be given away
    timeout: int = 20  # seconds, of a job whose caller names none
    rom_folders: tuple[str, ...] = ()  # absolute paths; a caller may name files below them as a device's ROM


def load(path: Path) -> Config:
    """The settings in PATH; the defaults where there is no file. Error: ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Config()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        where = "" if "line" in str(error) else f", line {len(text.splitlines())}"
        raise ConfigError(f"{path}{where}: this is not valid TOML: {error}") from None
    try:
        return _read(table)
    except ValueError as error:
        key = str(error).split(" ", 1)[0]
        raise ConfigError(f"{path}, line {_line_of(text, key)}: {error}") from None


def _read(table: dict[str, Any]) -> Config:
    readers = {
        "hypervisors": _hypervisors,
        "excluded-classes": lambda v: tuple(_class_code(c) for c in _strings("excluded-classes", v)),
        "never": lambda v: frozenset(_device_name(name) for name in _strings("never", v)),
        "timeout": _timeout,
        "rom-folders": _rom_folders,
    }
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in readers:
            raise ValueError(f"{key} is not a setting: the settings are {', '.join(readers)}")
        values[key.replace("-", "_")] = readers[key](value)
    return Config(**values)


def _strings(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key} is a list of strings")
    return tuple(value)


def _hypervisors(value: object) -> tuple[str, ...]:
    uris = _strings("hypervisors", value)
    if not uris or not all(uris):
        raise ValueError('hypervisors holds no URI, or an empty one: name at least one, "qemu:///system"')
    return uris


def _device_name(name: str) -> str:
    if not re.fullmatch(r"[a-z]+_[A-Za-z0-9_]+", name):
        raise ValueError(f'never holds {name!r}: it wants names of devices as the tree has them, "pci_0000_01_00_0"')
    return name


def _class_code(code: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{2}([0-9a-fA-F]{2})?", code):
        raise ValueError(
            f'excluded-classes holds {code!r}: a PCI class is two or four hexadecimal digits, "07" or "0c05"'
        )
    return code.lower()


def _timeout(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 3600:
        raise ValueError("timeout is a number of seconds from 1 to 3600")
    return value


def _rom_folders(value: object) -> tuple[str, ...]:
    folders = _strings("rom-folders", value)
    for path in folders:
        if not path.startswith("/") or path.startswith("//") or path != os.path.normpath(path):
            raise ValueError(
                f'rom-folders holds {path!r}: it wants absolute paths with nothing to shorten, "/srv/roms"'
            )
    return folders


def _line_of(text: str, key: str) -> int:
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(rf"\s*\"?{re.escape(key)}\"?\s*(=|\])", line) or line.strip().startswith(f"[{key}"):
            return number
    return 1
