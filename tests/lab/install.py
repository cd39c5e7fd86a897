"""Puts hostpassd into the lab's host exactly as a user would: a checkout, and ./dev install."""

from __future__ import annotations

from tests.checkout import packed
from tests.lab.machine import Host


def install(host: Host) -> str:
    """What ./dev install printed."""
    host.run("mkdir -p /root/hostpassd && tar -x --no-same-owner -C /root/hostpassd", input=packed())
    return host.run("cd /root/hostpassd && ./dev install", timeout=300).stdout
