"""Resident memory of this process, as Linux tells it; what `examples/measure` of sail-train does on the other side."""

import re
from pathlib import Path


def resident_bytes() -> int:
    """What is resident now."""
    return status_bytes("VmRSS")


def forget_peak() -> None:
    """Forgets the peak so far, that of loading (`clear_refs` in proc(5))."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    return status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024
