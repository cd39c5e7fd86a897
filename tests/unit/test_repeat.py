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
from tests.lab.repeat import pytest_runtest_protocol, watch

RESTARTS = Path(__file__).with_name("restarts")

class Host:
    def __init__(self):
        self.why = ""
    def lost(self):
        return self.why

@pytest.fixture(scope="session")
def host(request):
    print("BOOTED")
    watch(request.session, made := Host())
    yield made
    if made.why:
        raise RuntimeError("nothing to tidy up")
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
def test_c(host): assert host.why == ""
"""


@pytest.mark.parametrize(
    ("why", "times", "ends"),
    [
        ("The emulated host restarted by itself.", 0, {"passed": 3}),
        ("The emulated host restarted by itself.", 1, {"passed": 3}),
        ("The emulated host restarted by itself.", 2, {"passed": 1, "failed": 1}),
        ("The host no longer answers: gone.", 1, {"passed": 1, "failed": 1}),
        ("", 1, {"passed": 2, "failed": 1}),  # a failure on a host that is there as before
    ],
)
def test_what_a_lost_host_does_to_the_tests(tmp_path: Path, why: str, times: int, ends: dict[str, int]) -> None:
    (tmp_path / "conftest.py").write_text(LAB)
    (tmp_path / "test_it.py").write_text(TESTS.format(why=why, times=times))
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
    for word, count in ends.items():
        assert f"{count} {word}" in last, done.stdout
    assert ("failed" in last) == ("failed" in ends) == bool(done.returncode)
    assert not why or (times > 0) == (why in done.stdout)
