"""Every bus name, path, interface, error and polkit action, once."""

from __future__ import annotations

from hostpassd import errors

BUS_NAME = "org.hostpassd1"
ROOT = "/org/hostpassd1"
MANAGER_PATH = ROOT + "/manager"
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

# The errors that D-Bus itself has names for.
STANDARD_ERRORS = (
    errors.InteractiveAuthorizationRequired,
    errors.InvalidArgs,
    errors.PropertyReadOnly,
    errors.UnknownInterface,
    errors.UnknownMethod,
    errors.UnknownObject,
    errors.UnknownProperty,
)

# polkit's actions, without the prefix that all have.
ACTION_PREFIX = "org.hostpassd1."
ACTIONS = ("assign", "assign-override", "dismiss", "cancel-others")

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


def error_name(error: Exception) -> str:
    """The whole name of ERROR; a fault of our own is Failed."""
    prefix = STANDARD_ERROR_PREFIX if isinstance(error, STANDARD_ERRORS) else ERROR_PREFIX
    return prefix + (error.name if isinstance(error, errors.HostpassError) else errors.Failed.name)


def action_id(action: str) -> str:
    """polkit's id of ACTION, one of ACTIONS."""
    return ACTION_PREFIX + action
