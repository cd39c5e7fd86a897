"""./dev run, without what it installs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from dbus_next import Message
from dbus_next.aio import MessageBus

from tests.bus.busd import PROJECT, hang_up
from tests.run_private import NAME, Front

COMMAND = [sys.executable, "-B", "-m", "tests.run_private"]


def test_it_shows_a_simulated_host_with_an_assign_and_a_dismiss() -> None:
    done = subprocess.run([*COMMAND, "--simulated", "--once"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n  pci_0000_01_00_0 [" in done.stdout
    said = [line for line in done.stdout.splitlines() if " web 01:00.0: " in line]
    assert [line.rpartition("; ")[2] for line in said] == [
        "its driver is vfio-pci now",
        "its driver is vfio-pci now",
        "its driver is e1000e now",
    ]
    assert "GuestDidNotRelease" in said[1] and "is done" in said[2]
    assert done.stdout.endswith('s "running"\n')
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("The simulated host has")[2].split("```")[1].strip().splitlines()
    assert [line for line in shown if line != "..." and line not in done.stdout.splitlines()] == []


async def test_on_the_simulated_host_things_go_on() -> None:
    process = await asyncio.create_subprocess_exec(
        *COMMAND, "--simulated", cwd=PROJECT, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        assert process.stdout
        while not (line := (await process.stdout.readline()).decode()).startswith("export "):
            assert line, "it ended"
        bus = await MessageBus(bus_address=line.strip().partition("=")[2].strip("'")).connect()
        front = Front(bus)
        rows = {row["Name"]: row for row in (await front.objects()).values() if "Name" in row}
        assert [rows[name]["State"] for name in ("web", "build", "desktop")] == ["running", "running", "shut-off"]
        assert rows["desktop"]["Missing"] and rows["web"]["Title"] == "Web server"
        uses = {name: [use[1] for use in row.get("HostUses", ())] for name, row in rows.items()}
        assert uses["net_eno1"] == ["address", "default-route"] and uses["block_sdb"] == ["mount"]
        assert uses["block_nvme0n1"] == ["mount", "swap"]
        # Of the real host, which this runs on, nothing is seen.
        assert {name for name, codes in uses.items() if "address" in codes} == {"net_eno1"}
        assert await _signal(front, bus, "InterfacesRemoved") == "/org/hostpassd1/devices/usb_1_3"
        assert await _signal(front, bus, "InterfacesAdded") == "/org/hostpassd1/devices/usb_1_3"
        hang_up(bus)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        await process.communicate()


async def _signal(front: Front, bus: MessageBus, member: str) -> str:
    """The object of the next signal MEMBER that is about a USB device."""
    heard: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def hear(message: Message) -> None:
        if message.member == member and re.fullmatch(r".*/usb_1_\d", message.body[0]) and not heard.done():
            heard.set_result(message.body[0])

    bus.add_message_handler(hear)
    rule = f"type='signal',sender='{NAME}',member='{member}'"
    await front.call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", "s", rule)
    found = await heard
    bus.remove_message_handler(hear)
    return found


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
