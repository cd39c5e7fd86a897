"""The host as one end of the daemon."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostpassd.host.host import Host
from hostpassd.host.udev import Udev
from hostpassd.host.uses import HostUses
from hostpassd.model.events import Event, FilesHang


async def test_what_hung_is_read_when_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again: list[str] = []
    monkeypatch.setattr(Udev, "scan_soon", lambda _: again.append("devices"))
    monkeypatch.setattr(HostUses, "refresh", lambda _: again.append("uses"))
    told: list[Event] = []
    host = Host(told.append, str(tmp_path))
    host.files_hang(("/sys/devices/a/wwid",))
    host.files_hang(("/sys/devices/a/wwid", "/sys/devices/b/config"))
    assert again == []
    host.files_hang(("/sys/devices/b/config",))
    assert again == ["devices", "uses"]
    host.files_hang(())
    assert again == ["devices", "uses"] * 2
    assert [len(event.files) for event in told if isinstance(event, FilesHang)] == [1, 2, 1, 0]
