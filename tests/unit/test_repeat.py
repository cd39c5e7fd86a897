"""What the lab does with a test whose host restarted by itself or is no longer there: a lab with a made-up host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LAB = """
import pytest
from pathlib import Path
from tests.lab.repeat import end_watch, pytest_runtest_protocol, watch

RESTARTS = Path(__file__).with_name("restarts")

class Host:
    def __init__(self):
        self.why, self.closed, self.pipe, self.me = "", False, open(__file__), self
    def lost(self):
        assert not self.closed
        return self.why

@pytest.fixture(scope="session")
def host(request):
    print("BOOTED")
    watch(request.session, made := Host())
    yield made
    end_watch(request.session)
    made.closed = True
    if made.why:
        raise RuntimeError("nothing to tidy up")
    made.pipe.close()
"""
TESTS = """
def lose(host, why):
    with open(__file__ + ".lost", "a+") as file:
        file.seek(0)
        times = len(file.read())
        if times < {times}:
            file.write("x")
            host.why = why
            assert False, "lost"

def test_a(host): pass
def test_b(host): lose(host, {why!r})
"""
AFTER = """
import gc
def test_c(host):
    gc.collect()
    assert host.why == ""
"""


@pytest.mark.parametrize("after", ["", AFTER], ids=["last", "not last"])
@pytest.mark.parametrize(
    ("why", "times", "ends"),
    [
        ("The emulated host restarted by itself.", 0, {"passed": 2}),
        ("The emulated host restarted by itself.", 1, {"passed": 2}),
        ("The emulated host restarted by itself.", 3, {"passed": 2}),
        ("The emulated host restarted by itself.", 4, {"passed": 1, "failed": 1}),
        ("The host no longer answers: gone.", 1, {"passed": 1, "failed": 1}),
        ("", 1, {"passed": 1, "failed": 1}),  # a failure on a host that is there as before
    ],
)
def test_what_a_lost_host_does_to_the_tests(
    tmp_path: Path, why: str, times: int, ends: dict[str, int], after: str
) -> None:
    strict = "[pytest]\nfilterwarnings =\n  error::ResourceWarning\n  error::pytest.PytestUnraisableExceptionWarning\n"
    (tmp_path / "pytest.ini").write_text(strict)
    (tmp_path / "conftest.py").write_text(LAB)
    (tmp_path / "test_it.py").write_text(TESTS.format(why=why, times=times) + after)
    project = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stdout.splitlines()[-1]
    goes_on = bool(after) and (times < 4 and "no longer" not in why)
    for word, count in ends.items():
        assert f"{count + (goes_on and word == 'passed')} {word}" in last, done.stdout
    assert ("failed" in last) == ("failed" in ends) == bool(done.returncode)
    assert not why or (times > 0) == (why in done.stdout)
