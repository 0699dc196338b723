"""Memory of this process as `examples/measure` of sail-train counts it on the other side: of a GPU what torch has in tensors
there, since the process began; else what is resident, as Linux tells it."""

import re
from pathlib import Path

import torch


def taken_bytes(device: torch.device) -> int:
    """What is taken now."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else status_bytes("VmRSS")


def forget_peak(device: torch.device) -> None:
    """Forgets the peak so far of resident memory, that of loading (`clear_refs` in proc(5))."""
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most that was taken since `forget_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status_bytes("VmHWM")


def status_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024
