"""./dev check and ./dev test: lint, then the tests part by part, each beside its budget; budget.toml has the parts.

Lint that finds something ends it before any test. A part that fails does not keep the others from being run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("budget.toml")
WHOLE = 60  # minutes for all parts
LIMIT = 90  # minutes after which CI ends the run, so that more is a failure
INTERRUPTED = 2  # pytest's exit status


@dataclass(frozen=True)
class Part:
    """Some folders of tests, and the minutes they may take."""

    name: str
    folders: list[str]
    minutes: int

    def is_there(self) -> bool:
        return all((PROJECT / folder).is_dir() for folder in self.folders)


@dataclass(frozen=True)
class Outcome:
    """What became of a part's tests, and what they took."""

    passed: int
    failed: int
    skipped: int
    seconds: float


def parts(text: str) -> list[Part]:
    """The parts that TEXT, a budget, has, in its order."""
    return [Part(name, row["tests"], row["minutes"]) for name, row in tomllib.loads(text).items()]


def run_all(chosen: Sequence[Part], began: float) -> int:
    """Runs the parts that are there and reports. Returns the exit status; the first part's time is from BEGAN on."""
    outcomes: dict[str, Outcome] = {}
    for part in chosen:
        if part.is_there():
            outcomes[part.name] = run(part, began)
            began = time.monotonic()
    print(report(chosen, outcomes))
    too_long = sum(outcome.seconds for outcome in outcomes.values()) > LIMIT * 60
    return 1 if too_long or any(outcome.failed for outcome in outcomes.values()) else 0


def run(part: Part, began: float) -> Outcome:
    """Runs a part's tests. What they print is shown as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={results}", *part.folders]
        status = subprocess.run(command, cwd=PROJECT, check=False).returncode
        if status == INTERRUPTED and not results.exists():
            raise KeyboardInterrupt
        text = results.read_text(encoding="utf-8") if results.exists() else ""
    return counted(text, status, time.monotonic() - began)


def counted(results: str, status: int, seconds: float) -> Outcome:
    """What pytest's RESULTS come to. A run that ended badly with no test to blame counts as a failure."""
    suites = list(ET.fromstring(results).iter("testsuite")) if results else []
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    lost = 1 if status and not failed else 0
    return Outcome(tests - failed - skipped, failed + lost, skipped, seconds)


def report(chosen: Sequence[Part], outcomes: Mapping[str, Outcome]) -> str:
    """What each part took beside what it may take, and at last how many tests passed and failed."""
    lines = ["", "part       passed  failed  skipped     took   budget"]
    for part in chosen:
        if outcome := outcomes.get(part.name):
            counts = f"{outcome.passed:9}{outcome.failed:8}{outcome.skipped:9}"
            lines.append(f"{part.name:8}{counts}{_beside(outcome.seconds, part.minutes)}")
        else:
            lines.append(f"{part.name:8}{'not there yet':>35}{_clock(part.minutes * 60):>9}")
    total = sum(outcome.seconds for outcome in outcomes.values())
    lines.append(f"{'all':34}{_beside(total, min(WHOLE, sum(part.minutes for part in chosen)))}")
    passed, failed, skipped = (
        sum(getattr(outcome, name) for outcome in outcomes.values()) for name in ("passed", "failed", "skipped")
    )
    return "\n".join([*lines, f"{passed} passed, {failed} failed, {skipped} skipped"])


def _beside(seconds: float, budget: int) -> str:
    return f"{_clock(seconds):>9}{_clock(budget * 60):>9}{'  OVER ITS BUDGET' if seconds > budget * 60 else ''}"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def main(names: Sequence[str]) -> int:
    """Lints, and runs the parts of those names, or all. Returns the exit status."""
    began = time.monotonic()
    if subprocess.run([PROJECT / "dev", "lint"], check=False).returncode:
        print("dev: Lint found what is above; the tests were not run.", file=sys.stderr)
        return 1
    every = parts(BUDGET.read_text(encoding="utf-8"))
    try:
        return run_all([part for part in every if part.name in names or not names], began)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
