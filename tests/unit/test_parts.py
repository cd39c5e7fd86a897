"""How ./dev check and ./dev test go through their parts, and what ./dev cover tells."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests import cover, parts
from tests.parts import Outcome, Part


def part(folder: Path, name: str, text: str) -> Part:
    """A part with one file of tests."""
    (folder / name).mkdir()
    (folder / name / f"test_{name}.py").write_text(text)
    return Part(name, [str(folder / name)], 1)


def test_a_part_that_fails_does_not_hide_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chosen = [
        part(tmp_path, "bad", "def test_a(): assert False\ndef test_b(): pass"),
        part(tmp_path, "broken", "nonsense"),
        part(tmp_path, "empty", ""),
        Part("missing", [str(tmp_path / "missing")], 5),
        part(tmp_path, "good", "import pytest\ndef test_c(): pass\ndef test_d(): pytest.skip()"),
    ]
    assert parts.run_all(chosen, time.monotonic()) == 1
    told = capfd.readouterr().out.splitlines()
    rows = told[told.index("part       passed  failed  skipped     took   budget") + 1 :]
    assert [line.split()[:4] for line in rows[:5]] == [
        ["bad", "1", "1", "0"],
        ["broken", "0", "1", "0"],
        ["empty", "0", "1", "0"],  # a part without a test is a mistake
        ["missing", "not", "there", "yet"],
        ["good", "1", "0", "1"],
    ]
    assert told[-1] == "2 passed, 3 failed, 1 skipped"
    failed = [row.rpartition(".")[2] for row in rows[6:-1]]  # in a folder below pytest's root that comes before
    assert [row.removeprefix("FAILED ") for row in failed] == ["test_bad::test_a", "test_broken"]


def test_all_is_well_when_all_pass(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert parts.run_all([part(tmp_path, "good", "def test_a(): pass")], time.monotonic()) == 0
    assert capfd.readouterr().out.endswith("\n1 passed, 0 failed, 0 skipped\n")


HANGS = """
import pathlib, time
def test_a(): pass
def test_b():
    pathlib.Path(__file__).with_name("begun").touch()
    time.sleep(1000)
"""


def test_what_ci_would_end_ends_itself_and_says_what_it_has_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = part(tmp_path, "hangs", HANGS)
    begun = tmp_path / "hangs/begun"

    class Interrupted(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if self.returncode is None and not begun.exists():
                while not begun.exists():
                    time.sleep(0.01)
                raise subprocess.TimeoutExpired("pytest", 0)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    assert parts.run_all([hangs], time.monotonic() - parts.LIMIT * 60) == 1
    told = capfd.readouterr()
    assert told.out.endswith("\n1 passed, 1 failed, 0 skipped\n")
    assert f"more than {parts.LIMIT} minutes" in told.err


def test_what_is_over_its_budget_is_told() -> None:
    outcomes = {"slow": Outcome(1, 0, 0, 61), "fast": Outcome(1, 0, 0, 60)}
    told = parts.report([Part(name, [], 1) for name in outcomes], outcomes)
    assert [line.split()[0] for line in told.splitlines() if "OVER ITS BUDGET" in line] == ["slow", "all"]


def test_the_budget_is_within_the_whole() -> None:
    budget = parts.parts(parts.BUDGET.read_text())
    assert [part.name for part in budget] == ["check", "bare", "package", "lab", "windows"]
    assert sum(part.minutes for part in budget) <= parts.WHOLE
    assert budget[0].is_there()


def test_coverage_is_told_by_room() -> None:
    def row(*figures: int) -> dict[str, dict[str, int]]:
        return {"summary": dict(zip((*cover.COVERED, *cover.ALL), figures, strict=True))}

    files = {"a.py": row(1, 0, 2, 0), "bus/b.py": row(3, 2, 3, 2), "bus/c.py": row(0, 0, 5, 0)}
    measured = {"files": {f"hostpassd/{file}": figures for file, figures in files.items()}}
    rows = [line.split()[:2] for line in cover.table(measured).splitlines()]
    assert rows == [["hostpassd", "50.0"], ["hostpassd/bus", "50.0"], ["all", "50.0"]]
