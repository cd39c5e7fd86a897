"""The kernel's drivers whose names mean something here."""

from __future__ import annotations

import re

VFIO_PCI = "vfio-pci"

# What a driver is called; the kernel's own limit is 55 characters (MODULE_NAME_LEN).
DRIVER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Drivers that a function has for somebody else: where one of these was before, the host is owed nothing.
STUBS = frozenset({VFIO_PCI, "pci-stub"})

# Drivers that leave DMA to whoever owns the IOMMU group (since Linux 5.18 they set driver_managed_dma; before that
# vfio_dev_driver_allowed in drivers/vfio/vfio.c): a group with these alone is viable.
GROUP_SAFE = STUBS | {"pcieport"}
