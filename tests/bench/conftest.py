"""The lab's host, and a private bus with its callers, for measuring in."""

from tests.bus.conftest import broker, bus, client, new_client
from tests.lab.conftest import front, host

__all__ = ["broker", "bus", "client", "front", "host", "new_client"]
