"""Memory that a process keeps, so that a CPU need not zero its pages anew for each batch."""

from __future__ import annotations

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_heap(device: torch.device) -> bool:
    """Make this process keep the memory it frees, if raw maps are captured on a CPU. Returns whether it does.

    glibc maps every large tensor anew and gives it back when it is freed, so each batch pays for the kernel zeroing
    its maps' pages. M_MMAP_MAX and M_TRIM_THRESHOLD of mallopt(3) put them on a heap that stays. Without raw maps the
    heap's gaps would cost more memory than they save time, so call it for raw maps only; other allocators and systems
    are left alone always.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
