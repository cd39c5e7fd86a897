"""The lab's host, for measuring in."""

from tests.lab.conftest import front, host

__all__ = ["front", "host"]
