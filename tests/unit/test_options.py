"""The options of operations: each key, its type, its value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hostpassd import errors
from hostpassd.bus import options
from hostpassd.bus.router import Variant
from hostpassd.model.codes import BLOCKERS, NEVER
from hostpassd.passthrough.request import Options

DEFAULT = Options(timeout=33)
VALUES: dict[str, Any] = {
    "live": True,
    "config": False,
    "instance": 7,
    "timeout": 5,
    "wait": False,
    "guest-address": "0000:04:00.0",
    "rom-bar": True,
    "rom-file": "/usr/share/x.rom",
    "driver": "mlx5_vfio_pci",
    "startup-policy": "requisite",
    "boot-order": 2,
    "override": ["mounted"],
    "plan": "0" * 32,
}


def test_nothing_given_is_the_default() -> None:
    assert options.read({}, options.ASSIGN, DEFAULT) == DEFAULT


@pytest.mark.parametrize("name", options.ASSIGN)
def test_each_is_read_and_nothing_else_changes(name: str) -> None:
    read = options.read({name: Variant(options.ASSIGN[name], VALUES[name])}, options.ASSIGN, DEFAULT)
    field = name.replace("-", "_")
    wanted = frozenset(VALUES[name]) if name == "override" else VALUES[name]
    assert getattr(read, field) == wanted
    assert dataclasses.replace(read, **{field: getattr(DEFAULT, field)}) == DEFAULT


@pytest.mark.parametrize("name", options.ASSIGN)
def test_each_is_of_its_type_alone(name: str) -> None:
    other = "d"
    with pytest.raises(errors.InvalidOption, match=f"{name} is of type {options.ASSIGN[name]}, not {other}"):
        options.read({name: Variant(other, 1.0)}, options.ASSIGN, DEFAULT)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("timeout", 0, "from 1 to 3600"),
        ("timeout", 3601, "from 1 to 3600"),
        ("guest-address", "04:00.0", "is a PCI address such as"),
        ("guest-address", "", "is a PCI address such as"),
        ("driver", "", "name of a kernel module"),
        ("driver", "x" * 65, "name of a kernel module"),
        ("driver", "../vfio-pci", "name of a kernel module"),
        ("driver", "vfio pci", "name of a kernel module"),
        ("startup-policy", "", "is one of mandatory, requisite, optional"),
        ("startup-policy", "Optional", "is one of mandatory, requisite, optional"),
        ("startup-policy", "optional\n", "is one of mandatory, requisite, optional"),
        ("boot-order", 0, "from 1 to 2147483647"),
        ("boot-order", 2**31, "from 1 to 2147483647"),
        ("override", ["mounted", "nonsense"], "no blocker 'nonsense'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_words(name: str, value: Any, words: str) -> None:
    with pytest.raises(errors.InvalidOption, match=words):
        options.read({name: Variant(options.ASSIGN[name], value)}, options.ASSIGN, DEFAULT)


def test_a_rom_that_is_hidden_is_not_to_be_another_one() -> None:
    file, shown = Variant("s", "/usr/share/x.rom"), Variant("b", True)
    assert options.read({"rom-file": file, "rom-bar": shown}, options.ASSIGN, DEFAULT).rom_bar
    with pytest.raises(errors.InvalidOption, match="rom-bar hides it"):
        options.read({"rom-file": file, "rom-bar": Variant("b", False)}, options.ASSIGN, DEFAULT)


def test_an_unknown_one_is_refused_with_those_there_are() -> None:
    with pytest.raises(errors.InvalidOption, match="no option 'rom-bar' here: the options are config, instance"):
        options.read({"rom-bar": Variant("b", True)}, options.DISMISS, DEFAULT)


def test_a_code_that_cannot_be_overridden_is_no_mistake_of_words() -> None:
    """It stays refused: Blocked says so, with the reason."""
    never = next(code for code, row in BLOCKERS.items() if row.severity == NEVER)
    assert options.read({"override": Variant("as", [never])}, options.ASSIGN, DEFAULT).override == {never}
