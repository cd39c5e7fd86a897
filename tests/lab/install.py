"""Puts hostpassd into the lab's host exactly as a user would: a checkout, and ./dev install."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.lab.machine import Host

PROJECT = Path(__file__).resolve().parents[2]


def install(host: Host) -> str:
    """What ./dev install printed."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=PROJECT, stdout=subprocess.PIPE, check=True
    ).stdout
    files = [name for name in listed.decode().split("\0") if name and (PROJECT / name).is_file()]
    packed = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"],
        cwd=PROJECT,
        input="\0".join(files).encode(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    host.run("mkdir -p /root/hostpassd && tar -x --no-same-owner -C /root/hostpassd", input=packed)
    return host.run("cd /root/hostpassd && ./dev install", timeout=300).stdout
