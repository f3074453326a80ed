"""Load the stand-in's libraries; import this before torch, whose import loads torch_npu, which links against them.

As a pytest plugin (``-p host_cann.preload``) it comes before every conftest.
"""

from __future__ import annotations

import ctypes
import os

from host_cann.build import HOLDER, LIBRARIES, libraries

# torch_npu hands its own operators to a thread; the eager kernels here run at once and would overtake them.
os.environ["TASK_QUEUE_ENABLE"] = "0"
_FOLDER = libraries()
_LOADED = {name: ctypes.CDLL(str(_FOLDER / f"{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES}
LIBRARY = _LOADED[HOLDER]
