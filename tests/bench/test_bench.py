"""hostpassd beside its peers, in one run on one host, as ratios. Nothing here fails for being slow: it prints."""

from __future__ import annotations

import json

import pytest

from tests.lab.front import Front
from tests.lab.machine import Host

ROWS = {
    "start": ("start to READY, beside libvirtd's restart to its first node list", "libvirtd", 1.0),
    "latency": ("uevent to our signal, beside uevent to udevadm monitor", "udevadm", 1.1),
    "objects": ("GetManagedObjects per object, beside udisksd's", "udisksd", 0.1),
    "inventory": ("the whole inventory, beside virsh nodedev-list and nodedev-dumpxml", "virsh", 0.03),
}


@pytest.fixture(scope="module")
def many_disks(host: Host, front: Front) -> None:
    """256 logical units."""
    host.run("modprobe scsi_debug max_luns=32 num_tgts=8 fake_rw=1 && udevadm settle -t 600", timeout=660)


@pytest.mark.usefixtures("many_disks")
@pytest.mark.parametrize("row", ROWS)
def test_beside_its_peer(host: Host, row: str) -> None:
    _measure(host, row)


def _measure(host: Host, row: str) -> None:
    text, peer, wanted = ROWS[row]
    told = json.loads(host.run(f"python3 -B /opt/lab/bench.py {row}", timeout=600).stdout)
    ours, theirs = (told[who] / told.get(f"{who}-objects", 1) for who in ("ours", peer))
    ratio = f"{ours * 1e3:.2f} ms beside {theirs * 1e3:.2f} ms: {ours / theirs:.3f} x"
    print(f"\n{text}: {ratio} (wanted {wanted} x)  {told}")
    assert ours > 0 and theirs > 0
