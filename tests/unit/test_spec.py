"""The specification as code: what the XML declares, and what it must not."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from lxml import etree

from hostpassd import names
from hostpassd.bus import spec
from hostpassd.bus.spec import SOURCE, Specification

EMITS = '<annotation name="org.freedesktop.DBus.Property.EmitsChangedSignal" value="{}"/>'


def parse(members: str) -> spec.InterfaceSpec:
    text = f'<node><!-- a --><interface name="a.B"><!-- b -->{members}</interface></node>'
    return Specification.parse(text).interfaces["a.B"]


def test_shipped_specification_has_every_interface_of_names() -> None:
    ours = {
        value for key, value in vars(names).items() if isinstance(value, str) and value.startswith("org.hostpassd1.")
    }
    interfaces = set(Specification.load().interfaces)
    assert interfaces <= ours
    assert {names.MANAGER, names.DEVICE, names.DEVICE_MDEV_PARENT, names.MACHINE, names.JOB} <= interfaces


def test_signatures_and_argument_names() -> None:
    assign = Specification.load().interfaces[names.MANAGER].methods["Assign"]
    assert (assign.in_signature, assign.out_signature) == ("sasa{sv}", "o")
    assert [argument.name for argument in assign.inputs] == ["machine", "devices", "options"]
    assert Specification.load().interfaces[names.JOB].signals["Completed"].signature == "sssa{sv}"


def test_direction_defaults_as_the_dbus_specification_says() -> None:
    interface = parse(
        '<method name="M"><arg name="a" type="s"/><arg name="b" type="u" direction="out"/></method>'
        '<signal name="S"><arg name="a" type="t" direction="out"/><arg name="b" type="y"/></signal>'
    )
    assert (interface.methods["M"].in_signature, interface.methods["M"].out_signature) == ("s", "u")
    assert interface.signals["S"].signature == "ty"


def test_only_what_is_true_is_told() -> None:
    interface = parse(
        f'<property name="C" type="s" access="read">{EMITS.format("const")}</property>'
        f'<property name="T" type="as" access="read">{EMITS.format("true")}</property>'
        f'<property name="F" type="t" access="read">{EMITS.format("false")}</property>'
    )
    assert {name for name, declared in interface.properties.items() if declared.told} == {"T"}
    assert interface.properties["T"].signature == "as"


def test_text_is_the_file_without_comments() -> None:
    declared = ET.parse(spec.SOURCE).getroot()
    for node in declared.iterfind("interface"):
        text = Specification.load().interfaces[node.get("name", "")].text
        assert "<!--" not in text
        assert ET.canonicalize(text, strip_text=True) == ET.canonicalize(ET.tostring(node), strip_text=True)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ('<property name="P" type="s" access="readwrite"/>', "only read is served"),
        ('<property name="P" type="s" access="read"/>', "needs one .* annotation"),
        (f'<property name="P" type="s" access="read">{EMITS.format("invalidates")}</property>', "const, true or false"),
        ('<method name="M"/><method name="M"/>', "declared twice"),
        ('<method name="M"><arg name="a" direction="in"/></method>', "has no type"),
        ("<method/>", "has no name"),
        ("<", "not XML"),
    ],
)
def test_what_cannot_be_served_is_refused(members: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse(members)


def test_load_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.xml").write_text("no", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.xml: not XML"):
        Specification.load(tmp_path / "x.xml")


def declared() -> list[etree._Element]:
    """Every interface and member of the file."""
    return list(etree.parse(SOURCE).getroot().iter("interface", "method", "signal", "property"))


@pytest.mark.parametrize("node", declared(), ids=lambda node: node.get("name"))
def test_all_that_is_declared_says_what_it_is_and_since_when(node: etree._Element) -> None:
    comment = node.getprevious()
    assert isinstance(comment, etree._Comment) and comment.text
    meaning, _, since = comment.text.rpartition("Since:")
    assert meaning.strip() and re.fullmatch(r"\d+\.\d+", since.strip())


# What Qt has a type of its own for; of any other it has to be told one, or its code generator takes nothing at all.
QT_KNOWS = re.compile("[ybnqiuxtdsogv]|a[ysov]")
QT_TYPE = "org.qtproject.QtDBus.QtTypeName"


@pytest.mark.parametrize("node", declared(), ids=lambda node: node.get("name"))
def test_qt_is_told_a_type_for_each_that_it_does_not_know(node: etree._Element) -> None:
    wanted = {QT_TYPE} if node.tag == "property" and not QT_KNOWS.fullmatch(node.get("type", "")) else set()
    for way in ("in", "out"):
        arguments = [a for a in node.findall("arg") if a.get("direction", "out") == way]
        unknown = (at for at, a in enumerate(arguments) if not QT_KNOWS.fullmatch(a.get("type", "")))
        wanted |= {f"{QT_TYPE}.{way.title()}{at}" for at in unknown}
    notes = [note.get("name", "") for note in node.findall("annotation")]
    assert {name for name in notes if name.startswith(QT_TYPE)} == wanted
