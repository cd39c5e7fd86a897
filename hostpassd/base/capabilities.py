"""What this process may do beyond its user's rights, given up for good."""

from __future__ import annotations

import ctypes
import os

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_VERSION_3 = 0x20080522  # of capset(2): two words for each set

_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


def give_up_all() -> None:
    """Empties every set of this thread's capabilities. Raises OSError.

    A thread has its own sets, and hands them to the threads that it starts: call this before there are any.
    """
    _drop_bounding()
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)  # it fails only where there is no such set
    if _libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), (_Sets * 2)()) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _drop_bounding() -> None:
    """Empties the bounding set where the process has CAP_SETPCAP; without it the set grants nothing by itself."""
    capability = 0
    while _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
