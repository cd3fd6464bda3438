"""The most memory that a rank held during a case."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Counts from its making.

    On an accelerator: what torch's allocator had given out at most. On the CPU: the largest resident set of the
    process, with the interpreter, its libraries and the shared memory it has touched; that needs Linux, whose kernel
    can begin that count anew (``getrusage`` knows only the largest of the whole life, which is another case's).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_counting = True
        if device.type != "cpu":
            torch.get_device_module(device.type).reset_peak_memory_stats(device)
            return
        with suppress(OSError, AttributeError):  # no glibc
            # What earlier cases have freed is the allocator's still, and would count as this case's.
            ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR.write_text("5")  # proc(5): resets the peak resident set
        except OSError:  # another system, or a kernel or container without it
            self._is_counting = False

    def read(self) -> int | None:
        """Bytes; None where nobody counts them."""
        if self._device.type != "cpu":
            return int(torch.get_device_module(self._device.type).max_memory_allocated(self._device))
        if not self._is_counting:
            return None
        with suppress(OSError, ValueError):
            for line in _STATUS.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return None
