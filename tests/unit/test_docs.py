"""The documents against the code and the repository: codes, options, errors, links, paths, commands, spelling."""

from __future__ import annotations

import ast
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpassd import __version__, errors, names
from hostpassd.bus import options
from hostpassd.machines import domain_xml
from hostpassd.model import codes

REPOSITORY = Path(__file__).parents[2]
CODE = REPOSITORY / "hostpassd"


def files(*patterns: str) -> list[Path]:
    """The repository's files of these kinds, none of those that tools hide in it."""
    found = {path for pattern in patterns for path in REPOSITORY.rglob(pattern)}
    return sorted(path for path in found if "/." not in f"/{path.relative_to(REPOSITORY)}")


DOCUMENTS = files("*.md")


def text_of(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def table(name: str, first: str) -> list[list[str]]:
    """The rows below the heading row of the table in the document NAME whose first column is headed FIRST."""
    lines = iter(text_of(name).splitlines())
    for line in lines:
        if line.startswith(f"| {first} |"):
            break
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def word(cell: str) -> str:
    """What is in the backticks of CELL."""
    found = re.search("`([^`]+)`", cell)
    assert found, cell
    return found[1]


def sections(name: str) -> set[str]:
    """The headings of the third level."""
    return set(re.findall("^### (.+)$", text_of(name), re.MULTILINE))


# --- against the code ---


def test_the_blockers_are_those_of_the_code() -> None:
    rows = table("docs/blockers.md", "code")
    told = {word(code): (severity, meaning) for code, severity, meaning in rows}
    assert told == {code: (row.severity, row.meaning) for code, row in codes.BLOCKERS.items()}
    assert sections("docs/blockers.md") == codes.BLOCKERS.keys()


@pytest.mark.parametrize(
    ("first", "known"),
    [
        ("host use", codes.HOST_USES),
        ("problem", codes.PROBLEMS),
        ("step", codes.STEPS),
        ("consequence", codes.CONSEQUENCES),
    ],
)
def test_the_facts_are_those_of_the_code(first: str, known: dict[str, codes.Code]) -> None:
    rows = {word(code): (meaning, details) for code, meaning, details in table("docs/facts.md", first)}
    assert rows == {code: (row.meaning, keys_of(row)) for code, row in known.items()}


def test_the_warnings_are_those_of_the_code() -> None:
    told = {word(code): (details, meaning) for code, details, meaning in table("docs/holds.md", "warning")}
    assert told == {code: (keys_of(row), row.meaning) for code, row in codes.WARNINGS.items()}


def keys_of(row: codes.Code) -> str:
    return " ".join(f"`{key}` {codes.KEYS[key]}" for key in dict.fromkeys(row.fields))


def test_every_blocker_says_what_to_do() -> None:
    parts = re.split("^### (.+)$", text_of("docs/blockers.md"), flags=re.MULTILINE)
    for code, prose in zip(parts[1::2], parts[2::2], strict=True):
        assert "What to do: " in prose, code


def test_the_options_are_those_of_the_code() -> None:
    methods = {
        "Assign": options.ASSIGN,
        "PlanAssign": options.ASSIGN,
        "Dismiss": options.DISMISS,
        "PlanDismiss": options.DISMISS,
    }
    rows = {(word(row[0]), row[1]): row[2:] for row in table("docs/options.md", "option")}
    for at, (method, known) in enumerate(methods.items()):
        assert {option for option, takes in rows.items() if takes[at] == "yes"} == set(known.items()), method
    assert sections("docs/options.md") == {name for name, _ in rows}


def test_the_errors_are_those_of_the_code() -> None:
    told = {word(row[0]): row[1] for row in table("docs/errors.md", "error")}
    kinds = errors.HostpassError.__subclasses__()
    assert told == {kind.name: "D-Bus" if kind in names.STANDARD_ERRORS else "own" for kind in kinds}


def test_the_kinds_of_hold_are_those_of_the_code() -> None:
    kinds = set()
    for function in ast.walk(ast.parse(Path(domain_xml.__file__).read_text(encoding="utf-8"))):
        if isinstance(function, ast.FunctionDef) and function.name.startswith("_read_"):
            pairs = (node.elts for node in ast.walk(function) if isinstance(node, ast.Tuple) and len(node.elts) == 2)
            kinds |= {a.value for a, b in pairs if isinstance(a, ast.Constant) and not isinstance(b, ast.Constant)}
    assert sections("docs/holds.md") == kinds


def examples_of_holds() -> Iterator[tuple[str, str]]:
    parts = re.split("^### (.+)$", text_of("docs/holds.md"), flags=re.MULTILINE)
    for kind, prose in zip(parts[1::2], parts[2::2], strict=True):
        for block in re.findall("```xml\n(.*?)```", prose, re.DOTALL):
            for element in ET.fromstring(f"<examples>{block}</examples>"):
                yield kind, ET.tostring(element, encoding="unicode")


@pytest.mark.parametrize(("kind", "xml"), examples_of_holds())
def test_each_example_makes_a_hold_of_its_kind(kind: str, xml: str) -> None:
    assert domain_xml.claim_of(xml).kind == kind


def test_every_kind_of_hold_has_an_example() -> None:
    assert {kind for kind, _ in examples_of_holds()} == sections("docs/holds.md")


def test_the_actions_are_those_of_the_code() -> None:
    actions = set(map(names.action_id, names.ACTIONS))
    assert {word(row[0]) for row in table("docs/concepts.md", "action")} == actions


def test_the_version_is_the_newest_release_or_below_1_where_there_is_none() -> None:
    releases = re.findall(r"^## ([0-9.]+)", text_of("NEWS.md"), re.MULTILINE)
    assert releases[:1] == [__version__] or (not releases and __version__.startswith("0."))


# --- against the repository ---


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub("[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def prose_of(path: Path) -> str:
    """The text of a document without its blocks of code."""
    return re.sub("^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(document)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = (document.parent / file).resolve() if file else document
        assert found.exists(), target
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall("^#+ (.+)$", prose_of(found), re.MULTILINE)}, (
                target
            )


def paths_in(document: Path) -> set[str]:
    """What DOCUMENT names in backticks and looks like a path of the repository, or of the package."""
    quoted = re.findall(r"`([\w.*-]+(?:/[\w.*-]*)*)`", prose_of(document))
    tops = {path.name for root in (REPOSITORY, CODE) for path in root.iterdir() if path.is_dir()}
    return {path for path in quoted if (path.partition("/")[0] in tops and path not in tops) or path.endswith(".py")}


def exists(path: str) -> bool:
    return any(any(root.glob(path.rstrip("/"))) for root in (REPOSITORY, CODE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_paths_are_there(document: Path) -> None:
    assert {path for path in paths_in(document) if not exists(path)} == set()


def commands_of_dev() -> set[str]:
    helped = subprocess.run([REPOSITORY / "dev", "help"], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"^\./dev (\w+)", helped, re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_commands_are_there(document: Path) -> None:
    said = set(re.findall(r"\./dev (\w+)", document.read_text(encoding="utf-8")))
    assert said <= commands_of_dev()


# Words of ours that codespell takes for others.
KNOWN_WORDS = "caf,conexant,cruzer,inh,withs"  # not all of them are slips for every version of codespell


def test_spelling() -> None:
    texts = files("*.md", "*.py", "*.xml", "*.conf", "*.policy", "*.rules", "*.service", "*.toml", "*.txt", "dev")
    command = ["codespell", "--ignore-words-list", KNOWN_WORDS, *map(str, texts)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)
