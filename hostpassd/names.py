"""Every bus name, path, interface, error and polkit action, once."""

from __future__ import annotations

BUS_NAME = "org.hostpassd1"
ROOT = "/org/hostpassd1"
DEVICES = ROOT + "/devices"
MACHINES = ROOT + "/machines"
JOBS = ROOT + "/jobs"

MANAGER = "org.hostpassd1.Manager"
DEVICE = "org.hostpassd1.Device"
DEVICE_PCI = DEVICE + ".PCI"
DEVICE_USB = DEVICE + ".USB"
DEVICE_SCSI = DEVICE + ".SCSI"
DEVICE_MDEV = DEVICE + ".Mdev"
DEVICE_MDEV_PARENT = DEVICE + ".MdevParent"
DEVICE_NET = DEVICE + ".Net"
DEVICE_BLOCK = DEVICE + ".Block"
MACHINE = "org.hostpassd1.Machine"
JOB = "org.hostpassd1.Job"

ERROR_PREFIX = "org.hostpassd1.Error."
STANDARD_ERROR_PREFIX = "org.freedesktop.DBus.Error."

ACTION_ASSIGN = "org.hostpassd1.assign"
ACTION_ASSIGN_OVERRIDE = "org.hostpassd1.assign-override"
ACTION_DISMISS = "org.hostpassd1.dismiss"
ACTION_CANCEL_OTHERS = "org.hostpassd1.cancel-others"

# The journal's MESSAGE_IDs: one for every operation's end, one for every change that others made.
MESSAGE_OPERATION = "0b1a3c6bb0f84c0c9d3e8a4f5c6f5b51"
MESSAGE_FOREIGN_CHANGE = "6f3d1f0e7b574d0fb6c53f6f5a0d2c9e"


def device_path(name: str) -> str:
    """The object path of the device called NAME; a bijection, because names are [A-Za-z0-9_] only."""
    return f"{DEVICES}/{name}"


def machine_path(uuid: str) -> str:
    """The object path of the machine with UUID (lower case, dashes)."""
    return f"{MACHINES}/{uuid.replace('-', '_')}"


def job_path(number: int) -> str:
    """The object path of job NUMBER."""
    return f"{JOBS}/{number}"
