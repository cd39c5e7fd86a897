"""The house as docs/architecture.md has it: who imports whom, and which words stand where."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.unit.test_docs import CODE

# What each room imports of the others; a module at the top is a room of its own. What is not here imports all.
MAY_IMPORT = {
    "model": set[str](),
    "errors": {"model"},
    "names": {"errors"},
    "base": {"model", "errors"},
    "config": {"state"},
    "host": {"model", "errors", "base"},
    "machines": {"model", "errors", "base"},
    "state": {"model", "errors"},
    "passthrough": {"model", "errors", "base", "machines", "state"},
    "audit": {"model", "names", "state"},
    "bus": {"model", "errors", "base", "names", "state", "passthrough"},
}
WIRING = {"__init__", "__main__", "daemon", "ends", "sync"}

# The modules that a library is for.
LIBRARIES = {
    "pyudev": {"host/udev.py"},
    "libvirt": {"machines/connection.py"},
    "lxml": {"machines/domain_xml.py"},
    "dbus_next": {"bus/connection.py", "bus/peers.py", "bus/router.py", "bus/wire.py"},
}

# What no text below bus/ is made of.
OF_THE_BUS = ("org.hostpassd1", "org.freedesktop", "/org/")

MODULES = sorted(path.relative_to(CODE).as_posix() for path in CODE.rglob("*.py"))


def room_of(module: str) -> str:
    return module.split("/", maxsplit=1)[0].removesuffix(".py")


def imported(module: str) -> Iterator[str]:
    """The modules that MODULE imports, dotted."""
    for node in ast.walk(ast.parse((CODE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "no relative imports"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def texts(module: str) -> Iterator[str]:
    """The strings of MODULE without its docstrings."""
    tree = ast.parse((CODE / module).read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


def test_every_room_is_in_the_table() -> None:
    assert {room_of(module) for module in MODULES} == MAY_IMPORT.keys() | WIRING
    assert not any(room in others for room, others in MAY_IMPORT.items())


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in MAY_IMPORT])
def test_a_room_imports_only_what_is_below_it(module: str) -> None:
    own = room_of(module)
    for name in imported(module):
        first, _, rest = name.partition(".")
        if first == "hostpassd":
            other = rest.split(".")[0]
            known = other in MAY_IMPORT or other in WIRING
            assert other == own or other in MAY_IMPORT[own] or (not known and own != "model"), name


def test_nothing_goes_in_a_circle() -> None:
    below: set[str] = set()
    while wanting := MAY_IMPORT.keys() - below:
        ready = {room for room in wanting if MAY_IMPORT[room] <= below}
        assert ready, f"these wait for one another: {sorted(wanting)}"
        below |= ready


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_for_the_modules_that_are_made_for_it(library: str) -> None:
    found = {module for module in MODULES if any(name.split(".")[0] == library for name in imported(module))}
    assert found == LIBRARIES[library]


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) not in {"bus", "names", *WIRING}])
def test_nobody_below_the_bus_knows_its_words(module: str) -> None:
    assert [text for text in texts(module) if any(word in text for word in OF_THE_BUS)] == []
    assert "names" not in MAY_IMPORT[room_of(module)] or room_of(module) == "audit"


def test_the_tables_find_what_they_are_to_find() -> None:
    """Broken on purpose: an import of the room above, and a word of the bus."""
    assert "hostpassd.bus.router.Router" in imported("daemon.py")
    assert any("org.hostpassd1" in text for text in texts("names.py"))
