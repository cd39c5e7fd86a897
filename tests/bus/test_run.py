"""./dev run, without what it installs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.bus.busd import PROJECT

COMMAND = [sys.executable, "-B", "-m", "tests.run_private"]


def test_it_shows_a_simulated_host_with_an_assign_and_a_dismiss() -> None:
    done = subprocess.run([*COMMAND, "--simulated", "--once"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n  pci_0000_01_00_0 [" in done.stdout
    assert "the stored configuration of demo now has usb_1_1_2\n" in done.stdout
    assert "the stored configuration of demo now has nothing\n" in done.stdout
    assert done.stdout.endswith('s "running"\n')
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("Of the simulated host")[2].split("```")[1].strip().splitlines()
    assert [line for line in shown if line != "..." and line not in done.stdout.splitlines()] == []


def test_it_serves_front_ends_until_ctrl_c_ends_it_quietly() -> None:
    with subprocess.Popen(
        COMMAND,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout and process.stderr
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "Ctrl-C ends it.\n":
                break
        # What a person would do with the line before the last, in a shell, for a front end that takes the system bus.
        ask = "busctl --system get-property org.hostpassd1 /org/hostpassd1/manager org.hostpassd1.Manager State"
        told = subprocess.run(["sh", "-c", lines[-2] + ask], capture_output=True, text=True, check=False)
        assert (told.stdout, told.stderr) == ('s "running"\n', "")
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all that is in the foreground
        assert process.stdout.read() == "\nEnded.\n"
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_why_the_bus_does_not_start_is_one_sentence(tmp_path: Path) -> None:
    program = tmp_path / "dbus-daemon"
    program.write_text("#!/bin/sh\necho 'No place to listen.' >&2; exit 1\n")
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        COMMAND, cwd=PROJECT, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "run: dbus-daemon did not start: No place to listen.\n"
