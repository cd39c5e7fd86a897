"""The bus that the tests and ./dev run start."""

from __future__ import annotations

from pathlib import Path

import pytest
from dbus_next.aio import MessageBus

from tests.bus import busd


def test_why_a_bus_does_not_start_is_told(tmp_path: Path, broker: str) -> None:
    missing = tmp_path / "missing.conf"
    with pytest.raises(busd.BusDidNotStart, match=str(missing)), busd.PrivateBus(missing, broker):
        pass


async def test_a_host_without_polkit_has_a_bus(tmp_path: Path, broker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busd, "POLKIT_POLICY", tmp_path / "missing.conf")
    with busd.PrivateBus(broker=broker) as bus:
        connection = await MessageBus(bus_address=bus.address).connect()
        busd.hang_up(connection)
