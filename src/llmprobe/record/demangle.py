"""C++ names as people write them, by the C++ runtime that every torch brings."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


@functools.cache
def _demangler() -> Any:
    """``__cxa_demangle`` of the C++ runtime and ``free``; None where there is none."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        demangle = library.__cxa_demangle
        free = ctypes.CDLL(None).free
    except (OSError, AttributeError):
        return None
    demangle.restype = ctypes.c_void_p
    demangle.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
    free.restype, free.argtypes = None, (ctypes.c_void_p,)
    return demangle, free


@functools.lru_cache(maxsize=4096)
def demangled(name: str) -> str:
    """A C++ name as people write it; any other name as it is."""
    found = _demangler() if name.startswith("_Z") else None
    if found is None:
        return name
    demangle, free = found
    status = ctypes.c_int()
    pointer = demangle(name.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return name
    try:
        return ctypes.string_at(pointer).decode(errors="replace")
    finally:
        free(pointer)
