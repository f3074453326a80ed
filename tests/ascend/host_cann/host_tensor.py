"""``HostTensor`` of ``host_cann.h``."""

from __future__ import annotations

import ctypes


class HostTensor(ctypes.Structure):
    """A tensor as C++ and Python hand it to each other."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 16),
        ("data", ctypes.c_void_p),
        ("nbytes", ctypes.c_uint64),
        ("on_device", ctypes.c_int32),
    )
