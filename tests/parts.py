"""./dev check and ./dev test: lint, then the tests part by part, each beside its budget; budget.toml has the parts.

Lint that finds something ends it before any test. A part that fails does not keep the others from being run.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("budget.toml")
WHOLE = 60  # minutes for all parts
LIMIT = 82  # minutes after which the tests are ended, which is a failure; CI would end them after 90 and keep nothing
LAST_WORDS = 120  # seconds that tests which are ended have to tidy up and to report
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
    to_look_at: tuple[str, ...] = ()  # the names of those that failed


def parts(text: str) -> list[Part]:
    """The parts that TEXT, a budget, has, in its order."""
    return [Part(name, row["tests"], row["minutes"]) for name, row in tomllib.loads(text).items()]


def run_all(chosen: Sequence[Part], began: float) -> int:
    """Runs the parts that are there and reports. Returns the exit status; the first part's time is from BEGAN on."""
    until = began + LIMIT * 60
    outcomes: dict[str, Outcome] = {}
    for part in chosen:
        if part.is_there():
            outcomes[part.name] = run(part, began, until)
            began = time.monotonic()
    print(report(chosen, outcomes))
    return 1 if any(outcome.failed for outcome in outcomes.values()) else 0


def run(part: Part, began: float, until: float) -> Outcome:
    """Runs a part's tests, which are ended at UNTIL. What they print is shown as it comes."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junit-xml={results}", *part.folders]
        status = ended(command, until)
        if status == INTERRUPTED and not results.exists() and time.monotonic() < until:
            raise KeyboardInterrupt
        text = results.read_text(encoding="utf-8") if results.exists() else ""
    return counted(text, status, time.monotonic() - began)


def ended(command: Sequence[str], until: float) -> int:
    """The exit status of a pytest that is interrupted at UNTIL, as by Ctrl-C: it still says what it has seen."""
    with subprocess.Popen(command, cwd=PROJECT) as process:
        try:
            return process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            print(f"\ndev: The tests took more than {LIMIT} minutes and are ended here.", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGINT)
        try:
            process.wait(LAST_WORDS)
        except subprocess.TimeoutExpired:
            process.kill()
        return process.wait() or 1


def counted(results: str, status: int, seconds: float) -> Outcome:
    """What pytest's RESULTS come to. A run that ended badly with no test to blame counts as a failure."""
    suites = list(ET.fromstring(results).iter("testsuite")) if results else []
    tests, failures, errors, skipped = (
        sum(int(suite.get(name, "0")) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    lost = 1 if status and not failed else 0
    return Outcome(tests - failed - skipped, failed + lost, skipped, seconds, tuple(_names(suites)))


def _names(suites: Sequence[ET.Element]) -> Iterator[str]:
    for case in (case for suite in suites for case in suite.iter("testcase")):
        if case.find("failure") is not None or case.find("error") is not None:
            yield "::".join(filter(None, (case.get("classname"), case.get("name"))))


def report(chosen: Sequence[Part], outcomes: Mapping[str, Outcome]) -> str:
    """What each part took beside what it may take, which tests failed, and at last how many passed."""
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
    lines += [f"FAILED {name}" for outcome in outcomes.values() for name in outcome.to_look_at]
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
